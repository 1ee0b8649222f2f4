"""Log lines about a replica that waits."""

import time
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.liveness import wait_notice
from dreplica.distributed.liveness.notes import Notes
from dreplica.distributed.liveness.wait_notice import GroupWait, WaitNotice


class Caller:
    """Waiting replica whose calls are answered at once."""

    def __init__(self, rank: int, store: dist.Store, answers: list[dict[str, Any]]) -> None:
        self.notes = Notes(store)
        self.notice = WaitNotice(self.notes, (0, 1, 2), is_first=rank == 0)
        self.answers = answers
        self.called: dict[int, float] = {}

    def ask(self) -> int:
        number = len(self.called)
        self.called[number] = time.monotonic()
        for row in self.answers:
            self.notes.append(f"answers/{number}", row)
        return number

    def wait(self, number: int, seconds: float) -> None:
        wait = GroupWait(number, time.monotonic())
        while time.monotonic() - wait.since < seconds:
            self.notice.update(wait, 42, self.called, self.ask)
            time.sleep(0.01)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """Return a store, with all times divided by ten."""
    for name in ("FIRST_NOTICE_SECONDS", "_FIRST_ASK_SECONDS", "_ANSWER_SECONDS", "_LATER_SECONDS"):
        monkeypatch.setattr(wait_notice, name, getattr(wait_notice, name) / 10)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


WAITING = {"rank": 0, "step": 42, "waiting": True, "stack": []}
BUSY = {"rank": 1, "step": 41, "waiting": False, "stack": ["train.py:3 in <module>", "data.py:9 in load"]}


def test_notice_says_for_whom_and_how_often(store: dist.Store, caplog: pytest.LogCaptureFixture) -> None:
    Caller(0, store, [WAITING, BUSY]).wait(1, 1.3)
    first, second = caplog.messages
    assert first.startswith("waiting for replica 1 (after step 41, last heartbeat 0.")
    assert " s ago, at data.py:9 in load), replica 2 (no heartbeat for " in first
    assert first.endswith(" s at step 42")
    assert second.startswith("waiting for replica 1 ")


def test_short_wait_says_nothing(store: dist.Store, caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller(0, store, [WAITING, BUSY])
    for number in range(4):
        caller.wait(number + 1, 0.4)
    assert caplog.messages == []


def test_one_replica_speaks(store: dist.Store, caplog: pytest.LogCaptureFixture) -> None:
    callers = [Caller(rank, store, [WAITING, BUSY]) for rank in range(2)]
    begun = time.monotonic()
    while time.monotonic() < begun + 0.8:
        for caller in callers:
            caller.notice.update(GroupWait(1, begun), 42, caller.called, caller.ask)
        time.sleep(0.01)
    assert len(caplog.messages) == 1
    assert callers[1].called == {}


def test_notice_names_few_replicas(store: dist.Store, caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller(0, store, [WAITING])
    caller.notice = WaitNotice(caller.notes, range(1000), is_first=True)
    caller.wait(1, 0.8)
    assert "replica 4 (no heartbeat for 0 s), and 995 more for 1 s at step 42" in caplog.messages[0]
