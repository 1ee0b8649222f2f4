"""`tensors.bin` matches the trace after any interruption of the run."""

from pathlib import Path

import pytest
import torch

from dreplica.agreement.trace.reader import TENSORS_NAME, Trace
from dreplica.agreement.trace.tensor_digests import TensorRecord, find_stages
from dreplica.state.fingerprint.stage import Stage
from dreplica.state.stages import tensors_stage
from tests.agreement.recording import record, stages_of


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


def test_find_stages_ignores_frames_not_in_the_trace(tmp_path: Path) -> None:
    folder = record(tmp_path / "run", range(3), tensors=True)
    assert found(folder, 2) is not None
    assert found(folder, 2, (2, "weights", "one")) is None
    assert found(folder, 3) is None
    assert found(tmp_path / "nowhere", 2) is None


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
