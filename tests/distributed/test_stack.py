"""The Python stack of a thread."""

import os
import threading
from pathlib import Path

import pytest

from dreplica.distributed.stack import stack_of


def deeper(levels: int) -> tuple[str, ...]:
    return deeper(levels - 1) if levels else stack_of(threading.get_ident())


def test_stack_has_the_innermost_frames_last() -> None:
    stack = deeper(30)
    assert len(stack) == 10
    assert stack[-1].endswith("in stack_of")
    assert all(line.endswith("in deeper") for line in stack[:-1])


def test_stack_shortens_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert deeper(0)[-2] == f"test_stack.py:{deeper.__code__.co_firstlineno + 1} in deeper"
    assert any(line.startswith("_pytest" + os.sep) for line in stack_of(threading.get_ident())[:3])
    monkeypatch.chdir(tmp_path)
    assert deeper(0)[-2].startswith(__file__)


def test_stack_in_a_removed_folder_has_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert deeper(0)[-2].startswith(__file__)


def test_stack_of_an_ended_thread_is_empty() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    ident = thread.ident
    thread.join()
    assert ident is not None
    assert stack_of(ident) == ()
