"""report.json: whole or not at all, and JSON that every parser reads."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from dreplica.report.record import run_report
from dreplica.report.record.run_report import RunReport, append_metrics, write_json
from dreplica.state.progress import Position
from dreplica.training.events import EpochDone


def done(epoch: int, **values: list[float]) -> EpochDone:
    part = {"accuracy": [0.5, 0.5], "loss": [1.0, 1.0]}
    val = {name: values.get(name, given) for name, given in part.items()}
    return EpochDone(
        epoch, 5 * epoch, part, val, seconds=1.0, images_per_second=80.0, evaluation=None, position=Position(9)
    )


def strictly(text: str) -> Any:
    """As a strict parser reads it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"a": [1.5, float("nan")], "b": {"c": float("inf")}, "d": (1, -float("inf"))})
    assert strictly((tmp_path / "report.json").read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": [1, None]}
    append_metrics(tmp_path / "metrics.jsonl", done(1, loss=[float("nan"), 2.0]))
    assert strictly((tmp_path / "metrics.jsonl").read_text())["val"]["loss"] == [None, 2.0]


def test_a_full_disk_leaves_the_old_report_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "report.json", {"old": True})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_report.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "report.json", {"new": True})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": True}


def test_the_first_number_in_which_replicas_differ() -> None:
    report = RunReport("run", Path("run"), "identical", [])
    assert report.first_differing_result() is None
    report.epochs = [done(1), done(2, loss=[float("nan"), float("nan")])]
    assert report.first_differing_result() is None, "both are not a number"
    report.epochs.append(done(3, accuracy=[0.5, 0.25]))
    assert report.first_differing_result() == (3, "validation accuracy", [0.5, 0.25])
