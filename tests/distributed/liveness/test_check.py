"""The liveness check: the protocol of many replicas in one process, and what it concludes from heartbeats."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness import check as liveness_check
from dreplica.distributed.liveness.check import LivenessCheck, silent_seconds
from dreplica.distributed.liveness.lost import Losses, Lost
from dreplica.distributed.liveness.monitor import LivenessMonitor
from dreplica.distributed.liveness.notes import Notes


def tcp_store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def heartbeat(rank: int, step: int = 7, waiting: bool = True, **changes: Any) -> dict[str, Any]:
    stack = [] if waiting else ["train.py:3 in <module>"]
    row = {"rank": rank, "step": step, "compared": step - 1, "waiting": waiting, "finishing": False, "stack": stack}
    return row | changes


def conclude(rows: list[dict[str, Any]], ends: list[dict[str, Any]], ranks: tuple[int, ...] = (0, 1, 2)) -> Losses:
    notes = Notes(tcp_store())
    for row in rows:
        notes.append("answers/0", row)
    for row in ends:
        notes.append("ends", row)
    return LivenessCheck(notes, 0, ranks, {0: time.monotonic()}, timed_out=False).hold(holds_store=False)


def test_replica_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness_check, "_ANSWER_SECONDS", 0.2)
    assert conclude([heartbeat(0), heartbeat(1, waiting=False)], []) == Losses((Lost(2, "no-response", 6),))


def test_replica_that_does_not_wait_hangs() -> None:
    rows = [heartbeat(8), heartbeat(4, step=6, waiting=False), heartbeat(6, step=6, waiting=False)]
    lost = [Lost(i, "hung", 6, stack=("train.py:3 in <module>",)) for i in (4, 6)]
    assert conclude(rows, [], (4, 6, 8)) == Losses(tuple(lost))


def test_nothing_is_lost_if_all_replicas_wait() -> None:
    assert conclude([heartbeat(i) for i in range(3)], []) == Losses()


def test_reported_ends_are_losses() -> None:
    fell = Failure("ArithmeticError", "it fell")
    ends = [
        {"rank": 2, "step": 6, "code": "raised", "failure": fell.as_dict()},
        {"rank": 1, "step": 5, "code": "ended", "failure": None},
    ]
    assert conclude([heartbeat(0)], ends) == Losses((Lost(1, "ended", 5), Lost(2, "raised", 6, fell)))


def test_replica_that_has_finished_is_reported_with_its_steps() -> None:
    rows = [heartbeat(0, waiting=False, step=4), heartbeat(1, step=4, finishing=True), heartbeat(2)]
    losses = conclude(rows, [])
    assert [(item.replica_id, item.code) for item in losses.lost] == [(0, "hung")]
    assert losses.finished == {1: 4}


def test_silence_counts_from_the_first_call_without_answer() -> None:
    notes, now = Notes(tcp_store()), time.monotonic()
    for number, ranks in enumerate([(0, 1, 2), (0, 2), (0, 1)]):
        for rank in ranks:
            notes.append(f"answers/{number}", heartbeat(rank))
    silent = silent_seconds(notes, {0: now - 30, 1: now - 20, 2: now - 10}, [0, 1, 2, 3])
    assert {rank: round(seconds) for rank, seconds in silent.items()} == {2: 10, 3: 30}


def test_reader_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness_check, "_ANSWER_SECONDS", 0.2)
    store = tcp_store()
    notes = Notes(store)
    assert notes.count("readers/0/0") == 1  # a replica that is killed before it publishes
    notes.append("answers/0", heartbeat(0))
    check = LivenessCheck(notes, 0, (0, 1), {0: time.monotonic()}, timed_out=False)
    assert check.hold(holds_store=False) == Losses((Lost(1, "no-response", 6),))


class CountingStore:
    """Connection to a store that counts the requests of one replica.

    Replicas share a few connections: torch looks up the name of the host for each, which can take seconds.
    """

    def __init__(self, store: Any, requests: "Counter[str]") -> None:
        self._store, self._requests = store, requests

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any) -> Any:
            self._requests[name] += 1
            return method(*args)

        method = getattr(self._store, name)
        return method if name == "has_extended_api" else request

    def clone(self) -> "CountingStore":
        return self


@contextmanager
def monitors(num_replicas: int, dead: int) -> Iterator[tuple[dict[int, LivenessMonitor], dict[int, "Counter[str]"]]]:
    """Start the monitors of all replicas but one, and yield them with the requests of each."""
    store = tcp_store()
    connections = [store.clone() for _ in range(8)]
    counters: dict[int, Counter[str]] = {i: Counter() for i in range(num_replicas) if i != dead}
    started = {}
    for rank, counter in counters.items():
        shared: Any = CountingStore(connections[rank % len(connections)], counter)
        started[rank] = LivenessMonitor(shared, rank, num_replicas)
        started[rank].step = 7
        started[rank].waiting = True
    yield started, counters
    for seconds in (0, 30):
        for monitor in started.values():
            monitor._thread.close(seconds)


def check_all(started: dict[int, LivenessMonitor]) -> tuple[dict[int, list[Lost]], float]:
    """Return what each replica finds if all look for lost replicas at once, and the longest time."""
    found: dict[int, list[Lost]] = {}
    seconds: list[float] = []

    def find(rank: int, monitor: LivenessMonitor) -> None:
        begun = time.monotonic()
        found[rank] = monitor.find_lost()
        seconds.append(time.monotonic() - begun)

    threads = [threading.Thread(target=find, args=item) for item in started.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found, max(seconds)


@pytest.fixture
def many_threads() -> Iterator[None]:
    """Let threads that wait for the interpreter's lock wake up less often, since there are 2,000 of them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.2)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_replicas", [16, 256, 1000])
def test_all_survivors_name_the_lost_replica(monkeypatch: pytest.MonkeyPatch, num_replicas: int) -> None:
    dead = num_replicas - 1
    if num_replicas < 1000:
        monkeypatch.setattr(liveness_check, "_ANSWER_SECONDS", 1.5)
    with monitors(num_replicas, dead) as (started, counters):
        before = {rank: counter.total() for rank, counter in counters.items()}
        found, seconds = check_all(started)
        blamed = Counter((item.replica_id, item.code) for lost in found.values() for item in lost)
        assert blamed == {(dead, "no-response"): dead}
        assert len(found) == dead
        spent = sorted(counter.total() - before[rank] for rank, counter in counters.items())
        # An alarm, an answer, an election and, at most once per second, a look for the result. One replica reads.
        assert spent[-2] < 25
        assert spent[-1] < 60
        assert seconds < 10 or os.getloadavg()[0] > 4 * (os.cpu_count() or 1)
