"""Summaries of traces of any length, complete or with a partial last line."""

import json
import resource
from pathlib import Path

import pytest

from dreplica.report.html.trace_summary import Cell, read_trace

HEADER = json.dumps({"algorithm": "xxh3-128", "torch": "2", "replicas": 2}) + "\n"


def line(step: int, agreed: bool = True, epoch: int | None = 1) -> str:
    return json.dumps({"step": step, "epoch": epoch, "agreed": agreed, "digests": {"weights": "00" * 16}}) + "\n"


def traced(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + "".join(lines))
    return path


def test_missing_trace_and_trace_without_steps(tmp_path: Path) -> None:
    assert read_trace(tmp_path / "trace.jsonl").cells == []
    summary = read_trace(traced(tmp_path, line(0, epoch=None)))
    assert (summary.cells, summary.build_agreed, summary.last_step) == ([], True, 0)
    assert summary.num_replicas == 2


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("differing", [1, 5, 100])
def test_every_step_is_in_one_cell(tmp_path: Path, steps: int, differing: int) -> None:
    summary = read_trace(traced(tmp_path, *(line(step, step != differing) for step in range(1, steps + 1))), 8)
    cells = summary.cells
    assert len(cells) <= 8
    assert [cell.first for cell in cells] == [1, *(cell.last + 1 for cell in cells[:-1])]
    assert cells[-1].last == summary.last_step == steps
    assert all(cell.compared == cell.last - cell.first + 1 for cell in cells)
    assert [cell.differing for cell in cells] == [int(cell.first <= differing <= cell.last) for cell in cells]
    assert summary.first_differing == (differing if differing <= steps else None)


def test_uncompared_steps_differ_from_agreeing_steps(tmp_path: Path) -> None:
    summary = read_trace(traced(tmp_path, *(line(step) for step in (1, 2, 7, 8))), 4)
    assert summary.cells == [Cell(1, 2, 2, 0), Cell(3, 4, 0, 0), Cell(5, 6, 0, 0), Cell(7, 8, 2, 0)]


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    steps = [line(step, step < 5) for step in range(1, 7)] + [line(3), line(4)]
    summary = read_trace(traced(tmp_path, *steps), 3)
    assert summary.cells == [Cell(1, 2, 2, 0), Cell(3, 4, 2, 0), Cell(5, 6, 2, 2)]
    assert (summary.num_compared, summary.last_step) == (6, 4)


@pytest.mark.parametrize(("of_step", "of_evaluation"), [(True, False), (False, True), (False, False)])
def test_evaluation_belongs_to_step_before_it(tmp_path: Path, of_step: bool, of_evaluation: bool) -> None:
    summary = read_trace(traced(tmp_path, line(1), line(2, of_step), line(2, of_evaluation), line(3)))
    assert (summary.num_compared, summary.num_differing, summary.first_differing) == (3, 1, 2)


@pytest.mark.parametrize(
    "rest", ['{"step": 4, "epoch": 1, "agr', '{"step": 4, "epoch": 1, "agreed": true, "digests"', "\0\0"]
)
def test_partial_last_line_is_ignored(tmp_path: Path, rest: str) -> None:
    summary = read_trace(traced(tmp_path, line(1), line(2), line(3, epoch=2), rest))
    assert (summary.last_step, summary.last_epoch, summary.num_compared) == (3, 2, 3)
    assert summary.cut


def test_partial_header_is_reported(tmp_path: Path) -> None:
    path = traced(tmp_path)
    path.write_text(HEADER[:20])
    assert read_trace(path).cut


def test_line_with_other_key_order_is_read(tmp_path: Path) -> None:
    other = '{"digests": {}, "agreed": false, "epoch": null, "step": 2}\n'
    summary = read_trace(traced(tmp_path, line(1), other))
    assert (summary.num_compared, summary.first_differing, summary.last_epoch) == (2, 2, 1)


def test_long_trace_needs_constant_memory(tmp_path: Path) -> None:
    path = traced(tmp_path)
    with path.open("a") as file:
        for step in range(1, 200_001):
            file.write(line(step, step != 123_456))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = read_trace(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000, "kB; the file has 20 MB"
    assert (summary.num_compared, summary.num_differing, summary.last_step) == (200_000, 1, 200_000)
    (cell,) = [cell for cell in summary.cells if cell.differing]
    assert cell.first <= 123_456 <= cell.last
    assert 80 <= len(summary.cells) <= 160
