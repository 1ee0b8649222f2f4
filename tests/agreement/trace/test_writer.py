"""The trace contains the digests of a run, and nothing that depends on time or place."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.trace.line import GENERATORS
from dreplica.agreement.trace.line_format import Header
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME, Trace
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.errors import UsageError
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.stages import STAGES, Stage, tensors_stage
from tests.agreement.bodies import Job, train_all
from tests.agreement.recording import stages_of
from tests.harness import run_replicas

JOBS = {"now": Job(), "again": Job(), "later": Job(lag=1), "seed 1": Job(seed=1)}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Return the lines of every replica's trace for each job."""
    folders = {name: tmp_path_factory.mktemp(name) for name in JOBS}
    jobs = [replace(job, trace=str(folders[name]), evaluate_after=2) for name, job in JOBS.items()]
    for results in run_replicas(train_all, 2, jobs):
        assert [result.verdict for result in results] == [None] * len(jobs)
    return {
        name: [(folder / f"{replica_id}.jsonl").read_text().splitlines() for replica_id in range(2)]
        for name, folder in folders.items()
    }


def test_same_run_has_same_trace_on_every_replica(traces: dict[str, list[list[str]]]) -> None:
    assert traces["now"] == traces["again"]
    assert traces["now"][0] == traces["now"][1]


def test_lag_does_not_change_what_is_recorded(traces: dict[str, list[list[str]]]) -> None:
    assert traces["now"] == traces["later"]


def test_writer_lines(traces: dict[str, list[list[str]]], tmp_path: Path) -> None:
    header, *rows = (json.loads(line) for line in traces["now"][0])
    assert header.pop("check")
    assert header == {
        "format": 2,
        "algorithm": ALGORITHM,
        "torch": torch.__version__,
        "replicas": 2,
        "stages": list(STAGES),
    }
    assert [row[:4] for row in rows] == [
        [0, None, 12, 0b011000100],
        [1, 1, 12, 0b011111111],
        [2, 1, 12, 0b011111111],
        [2, 1, 14, 0b100000000],
        [3, 1, 12, 0b011111111],
        [4, 1, 12, 0b011111111],
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join([*traces["now"][0], ""]))
    steps = list(Trace(tmp_path).lines())
    assert [line.key for line in steps] == [(0, False), (1, False), (2, False), (2, True), (3, False), (4, False)]
    assert [line.epoch for line in steps] == [None, 1, 1, 1, 1, 1]
    assert all(line.agreed for line in steps)
    state = ("buffers", "output", "gradients", "optimizer", "weights", "rng")
    assert steps[0].stages == ("buffers", "weights", "rng")
    assert steps[1].stages == ("indices", "batch", *state)
    assert steps[3].stages == ("predictions",)
    for stage in ("weights", "gradients", "optimizer", "rng", "batch"):
        assert len({line.by_stage()[stage] for line in steps if len(line.stages) == 8}) == 4, stage


def test_other_seed_has_other_trace(traces: dict[str, list[list[str]]]) -> None:
    one, two = traces["now"][0], traces["seed 1"][0]
    assert one[0] == two[0]
    assert all(line != other for line, other in zip(one[1:], two[1:], strict=True))


def test_writer_flushes_each_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, 1) as trace:
        assert len(path.read_text().splitlines()) == 1
        for step in (1, 2):
            trace.step(step, None, True, {"weights": tensors_stage({"w": torch.ones(1)})})
            lines = path.read_text().splitlines()
            assert len(lines) == 1 + step
            assert json.loads(lines[-1])[0] == step


def steps_in(path: Path) -> list[int]:
    return [line.key[0] for line in Trace(path).lines()]


def record(path: Path, steps: range, value: float = 1.0, num_lines: int = 0, agreed: bool = True) -> TraceWriter:
    with TraceWriter(path, 1, num_lines) as trace:
        for step in steps:
            trace.step(step, None, agreed, {"weights": tensors_stage({"w": torch.full((1,), value)})})
    return trace


@pytest.mark.parametrize("num_lines", [0, 2, 5, 6])
def test_resumed_run_does_not_write_equal_lines_twice(num_lines: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert record(path, range(1, 6)).num_lines == 6
    again = record(path, range(max(num_lines, 1), 9), num_lines=num_lines)
    assert (again.num_lines, again.not_reproduced) == (9, None)
    assert steps_in(path) == [*range(1, 9)]


def test_resumed_run_reports_and_appends_differing_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 6))
    again = record(path, range(3, 8), value=2.0, num_lines=3)
    assert again.not_reproduced == (3, "weights")
    assert steps_in(path) == [1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


def test_resumed_run_ignores_lines_after_divergence(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    record(path, range(4, 5), value=7.0, num_lines=4, agreed=False)
    again = record(path, range(2, 6), num_lines=2)
    assert again.not_reproduced is None
    assert len(path.read_text().splitlines()) == 7


def test_writer_rejects_trace_of_other_algorithm(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"algorithm 'xxh3-128/1', but this run computes 'other/1'.*--run\.resume"):
        TraceWriter(path, 1, 2, algorithm="other/1")
    assert path.read_bytes() == whole
    TraceWriter(tmp_path / "other.jsonl", 1, algorithm="other/1").close()
    assert json.loads((tmp_path / "other.jsonl").read_text())["algorithm"] == "other/1"


def test_agreement_rejects_writer_of_other_algorithm(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "trace.jsonl", 1, algorithm="other/1") as trace,
        pytest.raises(ValueError, match=r"trace has algorithm 'other/1', but digests are computed with 'xxh3-128/1'"),
    ):
        Agreement(torch.nn.Linear(2, 2), trace=trace)


@pytest.mark.parametrize("tail", [b'[3,1,0,6,"aWf', b"\0" * 40, b"\0" * 40 + b"\n", b"\0\n\0\n\n"])
@pytest.mark.parametrize("num_lines", [0, 3])
def test_writer_removes_unwritten_tail(tail: bytes, num_lines: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + tail)
    again = record(path, range(max(num_lines, 1), 4), num_lines=num_lines)
    assert (again.num_missing, again.not_reproduced, path.read_bytes()) == (0, None, whole)


@pytest.mark.parametrize(
    "tail", [b"\xff\n", b"3\n", b'{"step": 3}\n', b"[]\n", b"\0\n3", b"[" * 999 + b"\n"], ids=range(6)
)
def test_writer_refuses_damaged_line(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    damaged = path.read_bytes() + tail
    path.write_bytes(damaged)
    for num_lines in (0, 3, 9):
        with pytest.raises(UsageError, match=r"is damaged at line 5\. .* keep only the 4 lines before it") as error:
            record(path, range(3, 4), num_lines=num_lines)
        assert (error.value.code, error.value.fields) == ("damaged-trace", {"path": str(path), "line": 5})
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", ["no trace\n", "{}\n", "[1]\n", "\n", "x" * 200_000], ids=range(5))
def test_writer_keeps_file_that_is_no_trace(content: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="does not begin with the header of a trace"):
        TraceWriter(path, 1)
    assert path.read_text() == content


def test_writer_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    for name in (TENSORS_NAME, TRACE_NAME):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match=rf"{name}' is not a regular file\."):
            TraceWriter(tmp_path / TRACE_NAME, 1, tensors=TensorRecord(tmp_path / TENSORS_NAME))
        os.unlink(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(UsageError, match=rf"{name}' is not a regular file\."):
            TraceWriter(tmp_path / TRACE_NAME, 1, tensors=TensorRecord(tmp_path / TENSORS_NAME))
        (tmp_path / name).rmdir()


@pytest.mark.parametrize("length", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_zeros_of_any_length_are_removed(length: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(length))
    trace = Trace(path)
    trace.read_through()
    assert (trace.is_cut_off, trace.last_key) == (True, (3, False))
    record(path, range(3, 4), num_lines=3)
    assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(length) + b"x" * 2**20 + b"\n")
    for reads in (lambda: Trace(path).read_through(), lambda: TraceWriter(path, 1, 2)):
        with pytest.raises(UsageError, match=r"is damaged at line 5\."):
            reads()


@pytest.mark.parametrize("content", [b"", b'{"format": 2, "algo', b"\0" * 4096], ids=range(3))
def test_writer_begins_again_after_cut_header(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    again = record(path, range(1, 4), num_lines=3)
    assert (again.num_missing, again.num_lines, steps_in(path)) == (3, 4, [1, 2, 3])


def test_writer_counts_missing_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(1, 4))
    again = record(path, range(7, 9), num_lines=7)
    assert (again.num_missing, again.num_lines) == (3, 6)
    path.unlink()
    again = record(path, range(7, 9), num_lines=7)
    assert (again.num_missing, again.num_lines) == (7, 3)
    assert "algorithm" in path.read_text().splitlines()[0]


def test_writer_without_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with TraceWriter(None, 1) as trace:
        Agreement(torch.nn.Linear(2, 2), trace=trace).step()
    assert not list(tmp_path.iterdir())


def draw(path: Path, steps: range, not_drawn: tuple[str, ...], num_lines: int = 0, state: bytes = b"a") -> TraceWriter:
    """Record steps whose `rng` holds a constant for each generator that was not drawn from."""
    with TraceWriter(path, 1, num_lines) as trace:
        for step in steps:
            states = b"".join(16 * (b"." if name in not_drawn else state) for name in GENERATORS)
            trace.step(step, None, True, {"rng": Stage(GENERATORS, states)}, not_drawn=not_drawn)
    return trace


def test_resumed_run_does_not_know_what_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    draw(path, range(6), ())
    before = path.read_bytes()
    again = draw(path, range(3, 6), ("python",), num_lines=4)
    assert (again.not_reproduced, path.read_bytes()) == (None, before)
    assert draw(path, range(3, 6), ("python",), num_lines=4, state=b"b").not_reproduced is None, "the state is unknown"
    assert draw(path, range(3, 6), (), num_lines=4, state=b"b").not_reproduced == (3, "rng")


def test_repeated_run_knows_what_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    draw(path, range(6), ())
    assert draw(path, range(6), ("python",)).not_reproduced == (0, "rng")


def test_writer_knows_what_was_drawn_in_kept_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert draw(path, range(2), GENERATORS).not_drawn == GENERATORS
    draw(path, range(2, 4), ("numpy",), num_lines=3)
    for num_lines, not_drawn in ((0, GENERATORS), (1, GENERATORS), (3, GENERATORS), (4, ("numpy",)), (9, ("numpy",))):
        assert draw(path, range(0), (), num_lines=num_lines).not_drawn == not_drawn, num_lines


def test_trace_of_other_axes_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    TraceWriter(path, 1, axes=["tp"]).close()
    TraceWriter(path, 1, axes=["tp"]).close()
    with pytest.raises(UsageError, match=r"digests of axes \('tp',\), but this run computes \(\)") as error:
        TraceWriter(path, 1)
    assert error.value.code == "axes-differ"


def test_trace_of_fewer_stages_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(Header(ALGORITHM, "2", 1, stages=STAGES[1:]).encode())
    with pytest.raises(UsageError, match="has no place for the stages indices, since an older release") as error:
        TraceWriter(path, 1)
    assert error.value.code == "older-trace"


@pytest.mark.parametrize("until", range(-1, 7))
def test_num_lines_until_keeps_lines_of_steps_done(until: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(7))
    num_lines = Trace(path).num_lines_until(until)
    assert num_lines == until + 2
    again = record(path, range(until + 1, 9), num_lines=num_lines)
    assert (again.num_missing, again.not_reproduced, steps_in(path)) == (0, None, [*range(9)])


def test_num_lines_until_counts_the_newest_line_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(7))
    record(path, range(3, 6), value=2.0, num_lines=4)
    assert steps_in(path) == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]
    trace = Trace(path)
    assert [trace.num_lines_until(step) for step in (2, 3, 4, 5, 6)] == [4, 9, 10, 11, 11]
    record(path, range(4, 8), value=2.0, num_lines=9)
    assert steps_in(path) == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]


def test_format_1_is_continued_in_format_1(tmp_path: Path) -> None:
    path = Path(shutil.copy(Path(__file__).parent / "format1" / "trace.jsonl", tmp_path))
    before = path.read_bytes()
    again = record(path, range(5, 8), num_lines=7)
    assert again.not_reproduced == (5, "batch")
    lines = path.read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 6, 7]
    assert record(path, range(6, 9), num_lines=10).not_reproduced is None
    assert steps_in(path)[-4:] == [5, 6, 7, 8]
    with path.open("a") as file:
        file.write('{"step": 9, "epoch": 1, "agr')
    assert record(path, range(8, 10), num_lines=12).num_missing == 0
    assert steps_in(path)[-2:] == [8, 9]


def test_run_killed_at_any_byte_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, range(4))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        num_lines = whole[:length].count(b"\n") // 2  # the checkpoint is older than the newest line
        record(path, range(max(num_lines - 1, 0), 4), num_lines=num_lines)
        assert path.read_bytes() == whole, length


@pytest.mark.parametrize("which", ["trace", "tensors"])
def test_full_disk_is_one_error_with_the_path(which: str, tmp_path: Path) -> None:
    tensors = TensorRecord(tmp_path / TENSORS_NAME)
    trace = TraceWriter(tmp_path / TRACE_NAME, 1, tensors=tensors)
    owner: Any = trace if which == "trace" else tensors
    owner._file.close()
    owner._file = Path("/dev/full").open("wb")  # noqa: SIM115  (the writer closes it)
    with pytest.raises(OSError, match="cannot record step 3: No space left") as caught, trace:
        trace.step(3, None, True, stages_of(3))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / TRACE_NAME))
    assert caught.value.__suppress_context__
