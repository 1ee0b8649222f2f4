"""A process that ends between any two things that it does to the disk loses no checkpoint that was good."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.training.checkpoint.async_writer import Saver
from dreplica.training.checkpoint.file_format import (
    MODEL_FILE,
    CheckpointError,
    list_checkpoints,
    parse,
    prune_checkpoints,
    read_files,
    remove_leftovers,
)
from dreplica.training.checkpoint.replica_state import StateCopy, copy_state

OPERATIONS = ("fsync", "rename", "mkdir", "rmdir", "unlink")


class Crashed(BaseException):
    """An exception that no handler catches, as SIGKILL."""


def copied(step: int) -> StateCopy:
    model = nn.Linear(2, 2)
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    replica.steps_done = step
    return copy_state(replica, Position(), {}, {})


@contextmanager
def crash_at(number: int) -> Iterator[None]:
    """Has the operation of that number not done, nor any after it."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count >= number:
                raise Crashed
            return operation(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def good_steps(folder: Path, part: str | None) -> list[int]:
    """Of the checkpoints that a run would go on from."""
    found = []
    for path in list_checkpoints(folder):
        try:
            found.append(parse(read_files(path if part is None else path / part)).state["step"])
        except CheckpointError:
            continue
    return found


@pytest.mark.parametrize("part", [None, "replica_0"])
@pytest.mark.parametrize("damaged", [(), (5,), (5, 9)], ids=str)
def test_crash_between_any_two_operations(damaged: tuple[int, ...], part: str | None, tmp_path: Path) -> None:
    """One checkpoint is kept, step 3's is good, and step 5's is written, damaged newer ones lying there or not."""
    before = tmp_path / "before"
    for step in (3, *damaged):
        saver = Saver(before, 99, part)
        saver.save(copied(step))
        saver.wait()
    for step in damaged:
        path = before / f"step_{step:06}" / (part or "") / MODEL_FILE
        path.write_bytes(path.read_bytes()[:-1])
    assert good_steps(before, part) == [3]
    state, number, ended = copied(5), 0, False
    while not ended:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(before, folder)
        saver = Saver(folder, 1, part)
        saver.unusable = {f"step_{step:06}" for step in damaged}
        with suppress(Crashed), crash_at(number):
            saver.prune()
            saver._write(state)  # what `save` does in a thread
            saver.prune()
            ended = True
        remove_leftovers(folder)
        assert good_steps(folder, part) in ([3], [5], [5, 3]), f"after {number - 1} operations"
    assert number > 9
    assert good_steps(folder, part) == [5]
    assert [path.name for path in list_checkpoints(folder)] == ["step_000005"]


def test_unusable_checkpoint_replaces_no_good_one(tmp_path: Path) -> None:
    for step in (3, 5, 9):
        (tmp_path / f"step_{step:06}").mkdir()
    prune_checkpoints(tmp_path, 1, unusable={"step_000009"})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005"]


def test_records_are_flushed_before_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename, mkdir = os.fsync, os.rename, os.mkdir

    def name(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path)).replace(f".{os.getpid()}", "")

    def note(word: str, path: Any) -> None:
        done.append(f"{word} {name(path)}")

    monkeypatch.setattr(
        os, "fsync", lambda number: (note("flush", os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (note("rename to", new), rename(old, new)))
    monkeypatch.setattr(os, "mkdir", lambda path, *more: (note("make", path), mkdir(path, *more)))
    trace = tmp_path / "trace.jsonl"
    trace.touch()
    saver = Saver(tmp_path / "checkpoints", 1, "replica_0", [trace, tmp_path / "metrics.jsonl"])
    saver.save(copied(5))
    saver.wait()
    assert not saver.failures
    place, temporary = "checkpoints/step_000005", "checkpoints/step_000005/.replica_0.tmp"
    files = {f"flush {temporary}/{file}" for file in ("model.safetensors", "optimizer.pt", "state.json")}
    assert set(done[-6:-3]) == files
    assert [line for line in done if line not in files] == [
        "flush trace.jsonl",
        "make checkpoints",
        "flush .",
        f"make {place}",
        "flush checkpoints",
        f"make {temporary}",
        f"flush {temporary}",
        f"rename to {place}/replica_0",
        f"flush {place}",
    ]
