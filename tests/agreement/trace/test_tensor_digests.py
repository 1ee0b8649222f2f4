"""`tensors.bin` matches the trace after any interruption of the run."""

import shutil
from pathlib import Path

import pytest
import torch

from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME, Trace
from dreplica.agreement.trace.tensor_digests import TensorRecord, find_stages
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import Stage
from dreplica.state.stages import tensors_stage
from tests.agreement.recording import record, stages_of

FORMAT_1 = Path(__file__).parent / "format1"
FIRST_LINE = b'{"format": "dreplica-tensors/2"}\n'


def hex_digests(stages: dict[str, Stage]) -> dict[str, str]:
    return {name: stage.digest.hex() for name, stage in stages.items()}


def found(folder: Path, step: int, *changes: tuple[int, str, str]) -> dict[str, Stage] | None:
    return find_stages(folder / TENSORS_NAME, step, hex_digests(stages_of(step, changes)))


def test_find_stages_finds_every_line_of_the_trace(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(5), evaluated=[2, 4], tensors=True)
    lines = list(Trace(folder).lines())
    assert [line.key for line in lines] == [
        (0, False),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    for line in lines:
        stages = Trace(folder).tensors(line)
        assert stages == stages_of(line.key[0], names=["predictions"] if line.key[1] else ["batch", "weights"])


def test_names_are_stored_once_and_steps_take_16_bytes_each(tmp_path: Path) -> None:
    few, more = (record(tmp_path / str(n), range(n), tensors=True) / TENSORS_NAME for n in (10, 110))
    assert more.stat().st_size - few.stat().st_size == 100 * (16 + 4 * 16)
    assert more.read_bytes().count(b'"weights"') == 1


def test_step_or_file_that_is_missing_is_not_found(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(3), tensors=True)
    assert found(folder, 2) is not None
    assert found(folder, 3) is None
    assert found(tmp_path / "nowhere", 2) is None


def test_frame_of_another_line_of_the_trace_is_ignored(tmp_path: Path) -> None:
    """A run that resumed without recording tensors has frames of the steps that it repeated with another result."""
    folder = record(tmp_path / "run", range(3), tensors=True)
    record(folder, range(2, 4), (2, "weights", "one"), num_lines=3)
    trace = Trace(folder)
    *_, first, second, _ = trace.lines()
    assert first.key == second.key == (2, False)
    assert trace.tensors(first) == stages_of(2)
    assert trace.tensors(second) is None


def test_frames_of_another_run_are_damage(tmp_path: Path) -> None:
    one = record(tmp_path / "one", range(3), tensors=True)
    other = record(tmp_path / "other", range(3), (2, "weights", "one"), tensors=True)
    shutil.copy(other / TENSORS_NAME, one)
    trace = Trace(one)
    lines = list(trace.lines())
    assert trace.tensors(lines[1]) == stages_of(1)
    with pytest.raises(UsageError, match=r"tensors\.bin' is damaged at step 2: its digests are not those") as error:
        trace.tensors(lines[2])
    assert error.value.fields == {"path": str(one / TENSORS_NAME), "step": 2}


@pytest.mark.parametrize("folder", ["recorded", "format1"])
def test_no_flipped_bit_changes_what_is_found(folder: str, tmp_path: Path) -> None:
    if folder == "recorded":
        record(tmp_path / "run", range(3), evaluated=[2], tensors=True)
    else:
        shutil.copytree(FORMAT_1, tmp_path / "run")
    path = tmp_path / "run" / TENSORS_NAME
    trace = Trace(tmp_path / "run")
    expected = {line: trace.tensors(line) for line in trace.lines()}
    whole = path.read_bytes()
    num_found = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        damaged = 0
        for line, stages in expected.items():
            try:
                tensors = trace.tensors(line)
            except UsageError as error:
                damaged += error.code == "damaged-tensors"
            else:
                num_found += tensors is not None
                assert tensors == stages or (tensors is None and folder == "format1")
        # A frame that is recorded for no line, because its step has changed, is not read.
        assert damaged or folder == "format1", bit
    assert num_found > len(expected) * len(whole) * 2


def test_resuming_refuses_damaged_head(tmp_path: Path) -> None:
    path = record(tmp_path / "run", range(3), tensors=True) / TENSORS_NAME
    whole = bytearray(path.read_bytes())
    whole[len(FIRST_LINE) + 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UsageError, match=f"is damaged at byte {len(FIRST_LINE)}\\. Restore it from a copy, or remove"):
        TensorRecord(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"something else\n", b'{"format": "dreplica-tensors/3"}\n' + bytes(99)])
def test_other_file_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / TENSORS_NAME
    path.write_bytes(content * 3)
    with pytest.raises(UsageError, match="is damaged at its first line"):
        TensorRecord(path)
    assert path.read_bytes() == content * 3


@pytest.mark.parametrize("kept", [0, 3, 8, 15, 16, 20, 79])
def test_zeros_after_a_power_failure_are_cut(kept: int, tmp_path: Path) -> None:
    """The file system has reserved space for two frames of 80 bytes, and has written the beginning of the first."""
    folder = record(tmp_path / "run", range(4), tensors=True)
    path = folder / TENSORS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: -160 + kept] + bytes(160 - kept))
    assert found(folder, 1) == stages_of(1)
    assert found(folder, 2) is None
    record(folder, range(2, 4), num_lines=3, tensors=True)
    assert path.read_bytes() == whole
    assert found(folder, 3) == stages_of(3)


def test_format_1_is_read_and_continued(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "run"))
    trace = Trace(folder)
    for line in trace.lines():
        names = ["predictions"] if line.key[1] else ["batch", "weights"]
        assert trace.tensors(line) == stages_of(line.key[0], names=names)
    before = {name: (folder / name).read_bytes() for name in (TRACE_NAME, TENSORS_NAME)}
    record(folder, range(5, 8), evaluated=[5, 7], num_lines=7, epochs=dict.fromkeys(range(5, 8), 2), tensors=True)
    for name, content in before.items():
        assert (folder / name).read_bytes().startswith(content)
    trace = Trace(folder)
    lines = list(trace.lines())
    assert [line.key for line in lines][-4:] == [(5, True), (6, False), (7, False), (7, True)]
    assert trace.first_repeated is None
    assert trace.tensors(lines[-2]) == stages_of(7)
    assert trace.tensors(lines[-1]) == stages_of(7, names=["predictions"])


@pytest.mark.parametrize("lost", [1, 15, 16, 17, 70, 200])
def test_truncated_frame_is_written_again(lost: int, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(6), tensors=True)
    path = folder / TENSORS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert found(folder, 2) is not None
    assert found(folder, 5) is None
    record(folder, range(3, 8), num_lines=4, tensors=True)
    for step in range(8):
        assert found(folder, step) == stages_of(step), step


def test_reading_ends_at_zeros(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(3), tensors=True)
    with (folder / TENSORS_NAME).open("ab") as file:
        file.write(bytes(64))
    assert found(folder, 2) is not None
    assert found(folder, 3) is None
    record(folder, range(3, 4), num_lines=4, tensors=True)
    assert found(folder, 3) == stages_of(3)


@pytest.mark.parametrize("kept", [0, 10])
def test_file_with_truncated_first_line_is_replaced(kept: int, tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(3), tensors=True)
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    record(folder, range(3, 4), num_lines=4, tensors=True)
    assert found(folder, 2) is None
    assert found(folder, 3) == stages_of(3)


def test_resumed_run_writes_few_frames_twice(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(50), tensors=True)
    before = (folder / TENSORS_NAME).read_bytes()
    record(folder, range(10, 50), num_lines=11, tensors=True)
    after = (folder / TENSORS_NAME).read_bytes()
    assert after.startswith(before)
    assert len(after) - len(before) <= 16 + 4 * 16  # the last step's, which may have lacked its evaluation


def test_evaluation_missing_in_tensors_is_written_again(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(5), evaluated=[4], tensors=True)
    path = folder / TENSORS_NAME
    layout, frame = len('{"predictions": ["one", "two"]}') + 16, 16 + 2 * 16
    path.write_bytes(path.read_bytes()[: -frame - layout])
    line = list(Trace(folder).lines())[-1]
    assert Trace(folder).tensors(line) is None
    record(folder, range(3, 5), num_lines=4, evaluated=[4], tensors=True)
    assert Trace(folder).tensors(line) == stages_of(4, names=["predictions"])


def test_resumed_run_appends_differing_frames(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(6), tensors=True)
    other = (3, "weights", "two")
    record(folder, range(2, 6), other, num_lines=3, tensors=True)
    assert found(folder, 3) == stages_of(3)
    assert found(folder, 3, other) == stages_of(3, [other])


def test_other_names_are_another_layout(tmp_path: Path) -> None:
    path = tmp_path / TENSORS_NAME
    rows = [
        {"weights": tensors_stage({"ä": torch.ones(1)}), "rng": tensors_stage({})},
        {"weights": tensors_stage({"ä": torch.ones(1), "b": torch.ones(2)})},
        {"weights": tensors_stage({"ä": torch.zeros(1)}), "rng": tensors_stage({})},
    ]
    for row in rows:  # a process for each of them
        writer = TensorRecord(path)
        writer.step(7, row)
        writer.close()
    for row in rows:
        assert find_stages(path, 7, hex_digests(row)) == row
    assert path.read_bytes().count(b'"weights"') == 2
