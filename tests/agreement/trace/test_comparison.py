"""Comparison of two recorded traces, including truncated and resumed ones."""

import json
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace import writer
from dreplica.agreement.trace.comparison import Comparison, compare_traces
from dreplica.agreement.trace.line_format import Header
from dreplica.agreement.trace.reader import TRACE_NAME, Trace
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import Stage
from tests.agreement.recording import record


def compare(one: Path, other: Path) -> Comparison:
    return compare_traces(Trace(one), Trace(other))


def append(folder: Path, text: str) -> None:
    with (folder / TRACE_NAME).open("a") as file:
        file.write(text)


@pytest.fixture(params=[1, 2])
def each_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record traces of format 1, and of format 2."""
    monkeypatch.setattr(writer, "Header", partial(Header, format=request.param))


@pytest.mark.usefixtures("each_format")
def test_equal_traces_have_no_difference(tmp_path: Path) -> None:
    one, other = (record(tmp_path / name, range(40), evaluated=[20, 39]) for name in ("one", "other"))
    found = compare(one, other)
    assert (found.place, found.num_steps, found.last_step) == (None, 39, 39)
    same = {stage: count for stage, count in found.num_same.items() if count}
    assert same == {"batch": 40, "weights": 40, "predictions": 2}
    assert found.num_digests == 82


@pytest.mark.usefixtures("each_format")
@pytest.mark.parametrize("step", [0, 1, 17, 39])
@pytest.mark.parametrize("tensors", [False, True])
def test_first_difference_has_step_stage_and_tensor(step: int, tensors: bool, tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(40), tensors=tensors)
    changes = [(step, "weights", "two"), (step, "batch", "two"), (39, "batch", "one")]
    place = compare(one, record(tmp_path / "other", range(40), *changes, tensors=tensors)).place
    assert place is not None
    assert (place.step, place.stage, place.phase) == (step, "batch", None)
    assert place.differing_stages == ["batch", "weights"]
    tensor = "one" if step == 39 else "two"
    assert (place.tensor, place.num_entries) == ((tensor, 2) if tensors else (None, 0))


def test_tensor_is_unknown_if_only_one_side_recorded_it(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(4), tensors=True)
    place = compare(one, record(tmp_path / "other", range(4), (2, "weights", "one"))).place
    assert place is not None
    assert (place.step, place.stage, place.tensor) == (2, "weights", None)


@pytest.mark.usefixtures("each_format")
def test_evaluation_comes_after_its_step(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(6), evaluated=[3, 5])
    other = record(tmp_path / "other", range(6), (3, "predictions", "two"), (4, "batch", "one"), evaluated=[3, 5])
    place = compare(one, other).place
    assert place is not None
    assert (place.step, place.stage, place.phase) == (3, "predictions", "evaluation")


@pytest.mark.parametrize("coordinates", [(None,), ((0,), (1,))])
def test_several_evaluations_of_a_step_are_compared(coordinates: tuple[Any, ...], tmp_path: Path) -> None:
    for name, values in (("a", (1, 2, 3)), ("b", (1, 2, 3)), ("c", (5, 2, 3)), ("d", (1, 2, 5)), ("e", (1, 2))):
        with TraceWriter(tmp_path / name, 2, axes=() if coordinates == (None,) else ("tp",)) as trace:
            for step in range(3):
                for is_evaluation, value in ((False, 0), *((True, value) for value in values)):
                    for coordinate in coordinates:
                        stages = {"predictions" if is_evaluation else "weights": Stage(("x",), bytes([value]) * 16)}
                        trace.step(step, None, True, stages, is_evaluation=is_evaluation, coordinate=coordinate)
    traces = {name: Trace(tmp_path / name) for name in "abcde"}
    found = compare_traces(traces["a"], traces["b"])
    assert (found.place, found.num_steps, found.num_alone) == (None, 2, [0, 0])
    assert found.num_same["predictions"] == 9 * len(coordinates)
    for name in "cd":
        found = compare_traces(traces["a"], traces[name])
        assert found.place is not None
        assert (found.place.step, found.place.phase) == (0, "evaluation")
    found = compare_traces(traces["a"], traces["e"])
    assert (found.place, found.num_steps) == (None, 2)
    assert traces["a"].first_repeated is None
    assert traces["a"].last_key == (2, True)


@pytest.mark.usefixtures("each_format")
def test_shorter_trace_is_compared_to_its_end(tmp_path: Path) -> None:
    traces = [
        Trace(record(tmp_path / "one", range(30))),
        Trace(record(tmp_path / "other", range(20))),
    ]
    found = compare_traces(*traces)
    assert (found.place, found.num_steps, found.last_step) == (None, 19, 19)
    assert [trace.last_key for trace in traces] == [(29, False), (19, False)]


@pytest.mark.usefixtures("each_format")
@pytest.mark.parametrize("cut", [1, 30, 60])
def test_truncated_line_is_skipped(cut: int, tmp_path: Path) -> None:
    one, other = (record(tmp_path / name, range(10)) for name in ("one", "other"))
    path = other / TRACE_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    trace = Trace(other)
    found = compare_traces(Trace(one), trace)
    assert (found.place, found.last_step) == (None, 8)
    assert (trace.is_cut_off, trace.last_key) == (True, (8, False))
    again = compare(other, other)
    assert (again.place, again.last_step) == (None, 8)


@pytest.mark.usefixtures("each_format")
def test_only_steps_in_both_traces_are_compared(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(13))
    every_third = record(tmp_path / "other", range(0, 13, 3), (4, "weights", "one"))
    found = compare(one, every_third)
    assert (found.place, found.num_steps, found.num_alone) == (None, 4, [8, 0])
    assert compare(every_third, one).num_alone == [0, 8]
    fewer = record(tmp_path / "fewer", range(13), (2, "weights", "one"), names=["batch", "rng"])
    found = compare(one, fewer)
    assert (found.place, found.num_digests) == (None, 13)
    assert compare(one, record(tmp_path / "none", range(13), names=["rng"])).num_digests == 0


@pytest.mark.usefixtures("each_format")
def test_epochs_and_number_of_replicas_are_not_compared(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(9), epochs=dict.fromkeys(range(9), 1))
    other = record(tmp_path / "other", range(9), epochs=dict.fromkeys(range(5, 9), 2), num_replicas=3)
    found = compare(one, other)
    assert (found.place, found.num_steps, found.epochs_differ_at) == (None, 8, 0)


@pytest.mark.usefixtures("each_format")
def test_newest_line_of_a_repeated_step_counts(tmp_path: Path) -> None:
    """A run whose replicas diverged at step 5 and that resumed from step 4."""
    good = record(tmp_path / "good", range(9))
    resumed = record(tmp_path / "resumed", range(5))
    record(resumed, range(5, 7), (5, "weights", "one"), (6, "weights", "one"), num_lines=6, agreed=False)
    place = compare(good, resumed).place
    assert place is not None
    assert place.step == 5
    record(resumed, range(4, 9), num_lines=5)
    trace = Trace(resumed)
    found = compare_traces(Trace(good), trace)
    assert (found.place, found.num_steps, found.last_step) == (None, 8, 8)
    assert (trace.first_repeated, trace.diverged_at) == (5, None)


@pytest.mark.usefixtures("each_format")
def test_steps_repeated_in_both_count_once(tmp_path: Path) -> None:
    one, other = (record(tmp_path / name, range(7)) for name in ("one", "other"))
    for folder in (one, other):
        record(folder, range(4, 9), *((step, "weights", "one") for step in range(4, 9)), num_lines=5)
    trace = Trace(other)
    found = compare_traces(Trace(one), trace)
    assert (found.place, found.num_steps, found.num_same["weights"], trace.first_repeated) == (None, 8, 9, 4)


def test_divergence_within_a_run_is_reported(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(6))
    other = record(tmp_path / "other", range(4))
    record(other, range(4, 6), (4, "weights", "one"), num_lines=5, agreed=False)
    trace = Trace(other)
    found = compare_traces(Trace(one), trace)
    assert found.place is not None
    assert (found.place.step, found.agreed, trace.diverged_at) == (4, (True, False), 4)


def test_lines_with_other_spacing_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "Header", partial(Header, format=1))
    one, other = record(tmp_path / "one", range(6), evaluated=[3]), tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in (one / TRACE_NAME).read_text().splitlines()]
    other.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    assert compare(one, other).num_digests == 13
    rows[3]["digests"]["weights"] = "0" * 32
    other.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    place = compare(one, other).place
    assert place is not None
    assert (place.step, place.stage) == (2, "weights")


def test_different_algorithms_are_not_compared(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(3))
    other = record(tmp_path / "other", range(3), algorithm="sha256/1")
    with pytest.raises(UsageError, match=r"'xxh3-128/1'.* of 'sha256/1'") as error:
        compare(one, other)
    assert error.value.code == "algorithms-differ"
    assert compare(other, other).num_steps == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("", "does not begin with the header"),
        ("[1]\n", "does not begin with the header"),
        ('{"algorithm": "xxh3-128/1", "torch": "2", "replicas": 2}\n{"step": 1}\n', "is damaged at line 2"),
        ('{"algorithm": "xxh3-128/1", "torch": "2", "replicas": 2}\n\0\0\n3\n', "is damaged at line 2"),
    ],
)
def test_invalid_trace_is_rejected(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=words):
        compare(path, path)
    with pytest.raises(UsageError, match=r"trace\.jsonl" if content is not None else r"contains no trace\.jsonl"):
        compare(tmp_path, tmp_path)


def test_duplicate_line_is_a_repeated_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "Header", partial(Header, format=1))
    one = record(tmp_path / "one", range(5))
    other = record(tmp_path / "other", range(5))
    append(other, (other / TRACE_NAME).read_text().splitlines()[-1] + "\n")
    found = compare(one, other)
    assert (found.place, found.num_steps) == (None, 4)


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    header = '{"algorithm": "xxh3-128/1", "torch": "2.15.0", "replicas": 2}\n'
    for path, epoch in ((one, 1), (other, 2)):
        rows = (
            f'{{"step": {step}, "epoch": {epoch}, "agreed": true, "digests": {{"weights": "{step:032x}"}}}}\n'
            for step in range(5_000)
        )
        path.write_text(header + "".join(rows))
    tracemalloc.start()
    assert compare(one, one).num_steps == compare(one, other).num_steps == 4_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < one.stat().st_size / 2, "of two files of that size"
