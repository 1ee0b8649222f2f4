"""How long a burn-in goes on, as a person writes it."""

import pytest

from dreplica.commands.burn_in.job_config import parse_duration, spell_duration
from dreplica.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("1.5h", 5400), ("2d", 172800), (" 1s ", 1)]
)
def test_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "-30m", "0s", "0.0h", "1e3s", "30min", "8h30m", "nan", "infh"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--for: .* For instance --for 30m"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (90, "90s"), (120, "2m"), (5400, "90m"), (28800, "8h")])
def test_durations_are_spelled_as_they_are_read(seconds: float, text: str) -> None:
    assert spell_duration(seconds) == text
    assert not seconds or parse_duration(text) == seconds
