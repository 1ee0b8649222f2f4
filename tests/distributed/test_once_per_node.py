"""One process creates a file while the others wait for it, but not forever if that process fails."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from dreplica.distributed.once_per_node import once_per_node
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.harness import run_replicas


def calls(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("call.*"))


def note_call(folder: Path) -> None:
    (folder / f"call.{os.getpid()}").touch()


def make_slowly(world: World, folder: Path) -> str:
    path = folder / "deep" / "file"

    def make() -> None:
        note_call(folder)
        time.sleep(0.3)
        path.write_text("whole")

    world.channel.gather(None)
    once_per_node(path, make)
    return path.read_text()


def test_one_process_creates_the_file(tmp_path: Path) -> None:
    assert run_replicas(make_slowly, 3, tmp_path) == ["whole"] * 3
    assert len(calls(tmp_path)) == 1


def fail_slowly(world: World, folder: Path) -> tuple[str, str, dict[str, str]]:
    def make() -> None:
        note_call(folder)
        time.sleep(1.0)
        raise UsageError(f"no network,\nsays {os.getpid()}", code="no-network", host="a")

    world.channel.gather(None)
    with pytest.raises(UsageError) as caught:
        once_per_node(folder / "file", make)
    return str(caught.value), caught.value.code, caught.value.fields


def test_waiting_processes_raise_the_same_error(tmp_path: Path) -> None:
    errors = run_replicas(fail_slowly, 3, tmp_path)
    (call,) = calls(tmp_path)
    text = f"no network,\nsays {call.removeprefix('call.')}"
    assert errors == [(text, "no-network", {"host": "a"})] * 3


def make_or_be_killed(folder: Path, is_killed: bool) -> None:
    def make() -> None:
        note_call(folder)
        if is_killed:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "file").write_text(str(os.getpid()))

    once_per_node(folder / "file", make)


def test_waiting_process_takes_over_if_the_first_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    first = context.Process(target=make_or_be_killed, args=(tmp_path, True))
    first.start()
    while not calls(tmp_path):
        time.sleep(0.01)
    second = context.Process(target=make_or_be_killed, args=(tmp_path, False))
    second.start()
    second.join(30)
    first.join(30)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    assert (tmp_path / "file").read_text() == str(second.pid)


def test_later_attempt_ignores_an_earlier_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail() -> None:
        raise UsageError("no network")

    with pytest.raises(UsageError, match="no network"):
        once_per_node(path, fail)
    once_per_node(path, path.touch)
    assert path.exists()
    path.unlink()
    with pytest.raises(ArithmeticError):
        once_per_node(path, lambda: 1 // 0)
    once_per_node(path, path.touch)  # the lock was released
    assert {entry.name for entry in tmp_path.iterdir()} <= {"file", "file.lock"}


def test_existing_file_needs_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    once_per_node(path, lambda: pytest.fail("called"))
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folder_raises_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken"):
        once_per_node(tmp_path / "taken" / "file", lambda: pytest.fail("called"))
