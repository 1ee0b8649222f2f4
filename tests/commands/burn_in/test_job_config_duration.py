"""Durations of a burn-in as text."""

import pytest

from dreplica.commands.burn_in.job_config import parse_duration, spell_duration
from dreplica.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("1.5h", 5400), ("2d", 172800), (" 1s ", 1)]
)
def test_parse_duration_accepts_number_and_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "-30m", "0s", "0.0h", "1e3s", "30min", "8h30m", "nan", "infh"])
def test_parse_duration_rejects_other_text(text: str) -> None:
    with pytest.raises(UsageError, match=r"--for: .* For instance --for 30m"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (90, "90s"), (120, "2m"), (5400, "90m"), (28800, "8h")])
def test_spell_duration_round_trips(seconds: float, text: str) -> None:
    assert spell_duration(seconds) == text
    assert not seconds or parse_duration(text) == seconds
