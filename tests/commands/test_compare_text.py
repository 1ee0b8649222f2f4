"""`dreplica compare` on traces as a custom loop records them: what it prints, and its exit codes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.commands.main import main
from dreplica.errors import ExitCode
from dreplica.state.fingerprint.stage import Stage
from tests.agreement.recording import record
from tests.messages import codes, text_of

MANIFEST = {"versions": {"torch": "2.14.1"}, "distributions": {"numpy": "2.0"}, "argv": ["train.py", "runs/a"]}


def loop(folder: Path, **changes: Any) -> Path:
    """Give a recorded folder the manifest and the report of a custom loop."""
    (folder / "manifest.json").write_text(json.dumps([MANIFEST | changes]))
    RunReport(verdict=Verdict(False, "none", "RECORDED 4 steps")).write(folder)
    return folder


def draw(folder: Path, steps: range, not_drawn: Collection[str] = (), num_lines: int = 0, value: str = "x") -> Path:
    """Record a loop whose `rng` depends on what it has drawn from."""
    folder.mkdir(exist_ok=True)
    with TraceWriter(folder / TRACE_NAME, 1, num_lines, TensorRecord(folder / TENSORS_NAME)) as trace:
        for step in steps:
            names = ("python", "numpy", "torch")
            states = [b"constant--------" if name in not_drawn else value.encode() * 16 for name in names]
            stages = {"weights": Stage(("w",), str(step).encode() * 16), "rng": Stage(names, b"".join(states))}
            trace.step(step, None, True, stages, not_drawn=not_drawn)
    return folder


def compare(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, list[str], dict[str, Any]]:
    """Return exit code, printed lines, and the JSON values."""
    code = main(["compare", *map(str, folders)])
    lines = capsys.readouterr().out.splitlines()
    assert main(["compare", "--json", *map(str, folders)]) == code
    return code, lines, json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *folders: Path) -> str:
    """Return the only line that `compare` prints for runs that it cannot compare."""
    assert main(["compare", *map(str, folders)]) == ExitCode.UNUSABLE
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""
    return line


def test_runs_of_a_custom_loop_have_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (loop(record(tmp_path / name, range(5))) for name in ("one", "other"))
    code, lines, found = compare(capsys, one, other)
    assert (code, found["notes"], found["evidence"], found["explain"]) == (ExitCode.AGREED, [], [], None)
    assert lines[:2] == ["config: not recorded", "manifest: the same"]
    assert lines[2].startswith("IDENTICAL 4 steps, 10 digests of batch, weights")
    (one / "config.yaml").write_text("optim: {lr: 0.1}\n")
    _, lines, found = compare(capsys, one, other)
    assert lines[0] == f"config: recorded only in {one}"
    assert found["notes"] == []


def test_run_without_report_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (loop(record(tmp_path / name, range(5))) for name in ("one", "other"))
    (other / "report.json").unlink()
    code, _, found = compare(capsys, one, other)
    note = f"{other}: has no report, so the run was interrupted or is in progress"
    assert (code, found["notes"]) == (ExitCode.AGREED, [note])


@pytest.mark.parametrize(("step", "topic"), [(0, "build"), (3, "weights")])
def test_difference_has_evidence_and_page(
    step: int, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = loop(record(tmp_path / "one", range(5), tensors=True))
    other = loop(record(tmp_path / "other", range(5), (step, "weights", "two"), tensors=True))
    code, lines, found = compare(capsys, one, other)
    assert code == ExitCode.DIVERGED
    assert found["summary"].endswith(": weights, two; no difference in the manifest explains it")
    assert codes(found["evidence"])[:2] == ["differing-stages", "entries-differ"]
    assert lines[-1] == f"  explain: dreplica explain {topic}"
    assert main(["explain", topic]) == ExitCode.AGREED


def test_entry_of_one_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        with TraceWriter(tmp_path / f"{name}.jsonl", 1, tensors=TensorRecord(tmp_path / TENSORS_NAME)) as trace:
            trace.step(1, None, True, {"optimizer": Stage((name, "both"), b"x" * 32)})
    _, _, found = compare(capsys, tmp_path / "one.jsonl", tmp_path / "other.jsonl")
    one_sided = [item["text"] for item in found["evidence"] if item["code"] == "entry-one-sided"]
    assert one_sided == [f"{name} exists only in {tmp_path / f'{name}.jsonl'}" for name in ("one", "other")]


def test_generator_drawn_from_in_one_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = draw(tmp_path / "one", range(5), ["numpy"])
    other = draw(tmp_path / "other", range(5), ["python"])
    code, _, found = compare(capsys, one, other)
    assert (code, found["first_difference"]["stage"]) == (ExitCode.DIVERGED, "rng")
    drawn = [item["text"] for item in found["evidence"] if item["code"] == "generator-drawn-one-sided"]
    assert drawn == [
        f"Python's generator was drawn from only in {one}",
        f"NumPy's generator was drawn from only in {other}",
    ]


@pytest.mark.parametrize("begins", ["after step 0", "with a gap"])
def test_resumed_run_does_not_know_what_was_drawn(
    begins: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run drew from both generators before step 3. The second one resumed there, and drew again at step 6."""
    one = draw(tmp_path / "one", range(9))
    other = tmp_path / "other"
    if begins == "with a gap":
        draw(other, range(3))
    draw(other, range(3, 6), ["python", "numpy"], num_lines=4 if begins == "with a gap" else 0)
    draw(other, range(6, 9), num_lines=7 if begins == "with a gap" else 4)
    code, _, found = compare(capsys, one, other)
    assert (code, found["outcome"]) == (ExitCode.AGREED, "identical")
    assert found["digests_same"]["rng"] == found["digests_same"]["weights"] - 3
    (note,) = (note for note in found["notes"] if "rng" in note)
    assert note.startswith("rng was not compared in 3 steps: a run that resumed")
    # Another state of a generator that both have drawn from is a difference.
    draw(other, range(9, 10), num_lines=10, value="y")
    draw(one, range(9, 10), num_lines=10)
    assert compare(capsys, one, other)[2]["first_difference"]["step"] == 9


def test_damaged_trace_is_not_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (record(tmp_path / name, range(5)) for name in ("one", "other"))
    path = other / TRACE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"A", b"B", 1)
    path.write_bytes(b"".join(lines))
    for folders in ((one, other), (other, one)):
        assert f"error: '{path}' is damaged at line 4." in refusal(capsys, *folders)


def test_damaged_tensors_are_not_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = record(tmp_path / "one", range(5), tensors=True)
    other = record(tmp_path / "other", range(5), (3, "weights", "two"), tensors=True)
    path = other / TENSORS_NAME
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # the frame of a step is 80 bytes: that of step 3
    path.write_bytes(content)
    assert f"error: '{path}' is damaged at step 3. Restore it from a copy, or remove it" in refusal(capsys, one, other)
    path.unlink()
    assert compare(capsys, one, other)[2]["first_difference"]["tensor"] is None


def test_many_distributions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = loop(record(tmp_path / "one", range(5)), distributions={f"package{n}": "1.0" for n in range(300)})
    other = loop(record(tmp_path / "other", range(5)), distributions={f"package{n}": f"1.{n}" for n in range(300)})
    _, lines, found = compare(capsys, one, other)
    assert len([line for line in lines if line.startswith("│ distributions")]) <= 11
    assert len(lines) < 40
    assert any("289 more that differ" in line for line in lines)
    assert len(found["manifest"]) == 299, "everything, for programs"


def test_text_of_missing_tensors_names_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = record(tmp_path / "one", range(5), tensors=True)
    other = record(tmp_path / "other", range(5), (3, "weights", "two"))
    _, _, found = compare(capsys, one, other)
    assert "--agreement.record tensors" in text_of(found["evidence"], "tensor-not-in-both")


def test_shard_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        with TraceWriter(tmp_path / f"{name}.jsonl", 6, axes=["tp", "pp"]) as trace:
            for step in range(4):
                for coordinate in ((0, 0), (0, 1), (1, 0)):
                    value = name if (step, coordinate) == (2, (0, 1)) else "same"
                    trace.step(step, None, True, {"weights": Stage((value,), b"x" * 16)}, coordinate=coordinate)
    code, lines, found = compare(capsys, tmp_path / "one.jsonl", tmp_path / "other.jsonl")
    assert (code, found["steps_same"], found["digests_same"]["weights"]) == (ExitCode.DIVERGED, 1, 7)
    assert found["first_difference"]["coordinate"] == {"tp": 0, "pp": 1}
    assert any(line.endswith("where: step 2, stage weights, tp 0, pp 1") for line in lines)
    assert compare(capsys, *[tmp_path / "one.jsonl"] * 2)[2]["digests_same"]["weights"] == 12
