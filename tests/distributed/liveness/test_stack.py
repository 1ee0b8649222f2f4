"""The Python stack of a thread."""

import copy
import heapq
import os
import threading
from pathlib import Path

import pytest

from dreplica.distributed.liveness.stack import innermost, stack_of


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
    assert any(line.startswith(os.path.join("...", "_pytest", "")) for line in stack_of(threading.get_ident()))
    monkeypatch.chdir(tmp_path)
    assert deeper(0)[-2].startswith(__file__)


def test_innermost_frame_is_the_users() -> None:
    lines: list[tuple[str, ...]] = []

    def compare(_: int) -> int:
        lines.append(stack_of(threading.get_ident()))
        return 0

    heapq.nsmallest(1, [3, 1, 2], key=compare)
    own = f"{os.path.relpath(__file__)}:{compare.__code__.co_firstlineno + 1} in "
    assert innermost(lines[0][:-1]).startswith(own)
    assert innermost([".../torch/a.py:1 in f", ".../torch/b.py:2 in g"]) == ".../torch/b.py:2 in g"
    assert innermost(["train.py:1 in f", ".../torch/b.py:2 in g"]) == "train.py:1 in f"


def test_stack_keeps_the_users_frame_above_libraries() -> None:
    stacks: list[tuple[str, ...]] = []
    blocked = threading.Event()

    def train() -> None:
        copy.deepcopy([[[[[[[[[Blocks()]]]]]]]]])

    class Blocks:
        def __deepcopy__(self, _: object) -> None:
            copy.deepcopy([[[[[[[[[[Waits()]]]]]]]]]])

    class Waits:
        def __reduce__(self) -> str:
            stacks.append(stack_of(threading.get_ident())[:-2])
            blocked.set()
            return ""

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(5)
    assert "__deepcopy__" in stacks[0][0]
    assert all(line.startswith("...") for line in stacks[0][1:])


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
