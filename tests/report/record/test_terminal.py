"""Lines of a run in progress."""

import io
import logging
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from dreplica.report.record.terminal import EPOCH_HEADER, ProgressDisplay, epoch_line
from dreplica.training.events import EpochDone
from tests.report.record.test_metrics import done

NAN = float("nan")


def epoch(**changes: Any) -> EpochDone:
    return replace(done(12), lr=[[0.05]], images_per_second=1234.4, seconds=4.56, **changes)


def part(loss: list[float], accuracy: list[float]) -> dict[str, list[float]]:
    return {"loss": loss, "accuracy": accuracy}


def test_epoch_line_names_all_values_in_80_columns() -> None:
    line = epoch_line(epoch(train=part([0.75, 0.75], [0.5, 0.5]), val=part([1.25, 1.25], [0.625, 0.625])))
    assert line.split() == ["12", "0.7500", "0.5000", "1.2500", "0.6250", "0.05", "1234", "4.6", "s"]
    assert len(line) == len(EPOCH_HEADER) == 79
    ends = [EPOCH_HEADER.index(title) + len(title) for title in ("train loss", "val loss", "lr", "images/s", "time")]
    assert all(line[end - 1] != " " and line[end : end + 1].strip() == "" for end in ends)


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        ([0.5], "0.5000"),
        ([0.5, 0.5, 0.5], "0.5000"),
        ([0.5, 0.625], "0.500/0.625"),
        ([0.5, 0.75, 0.625], "0.500-0.750"),
        ([NAN], "nan"),
        ([NAN, NAN], "nan"),
        ([NAN, 0.5], "nan/0.500"),
        ([NAN, 0.5, 0.625], "nan"),
        ([1e12, float("inf")], "1e+12/inf"),
        ([123456.0], "1.23e+05"),
    ],
)
def test_epoch_line_shows_values_of_differing_replicas(loss: list[float], shown: str) -> None:
    line = epoch_line(epoch(train=part(loss, [0.5] * len(loss))))
    assert line.split()[1] == shown
    assert len(line) == 79


@pytest.mark.parametrize(
    ("lr", "shown"),
    [
        ([[0.05], [0.05]], "0.05"),
        ([[1.5e-4], [1.5e-4]], "0.00015"),
        ([[0.1, 0.01], [0.1, 0.01]], "0.01-0.1"),
        ([[0.1], [0.2]], "0.1-0.2"),
    ],
)
def test_epoch_line_shows_range_of_learning_rates(lr: list[list[float]], shown: str) -> None:
    assert epoch_line(replace(epoch(), lr=lr)).split()[5] == shown


def test_epoch_line_without_learning_rate_and_with_long_time() -> None:
    line = epoch_line(replace(epoch(), lr=[[]], seconds=5400.0))
    assert line.endswith("90 min")
    assert len(line) == 79


@pytest.mark.parametrize("is_terminal", [True, False])
def test_header_is_shown_once_and_every_line_logged(is_terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dreplica")
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    display = ProgressDisplay(console, True, "identical")
    for _ in range(2):
        display.epoch(epoch())
    display.close()
    assert [record.getMessage() for record in caplog.records] == [
        EPOCH_HEADER,
        epoch_line(epoch()),
        epoch_line(epoch()),
    ]
    assert all(hasattr(record, "on_stdout") == is_terminal for record in caplog.records), "no line appears twice"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert (text.count(EPOCH_HEADER), text.count(epoch_line(epoch()))) == ((1, 2) if is_terminal else (0, 0))


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dreplica")
    ProgressDisplay(Console(quiet=True), False, "identical").epoch(epoch())
    assert caplog.records == []
