"""Waits that are bounded and reported."""

import logging
import threading
import time

import pytest

from dreplica.distributed.rendezvous import wait as module
from dreplica.distributed.rendezvous.wait import Wait, WaitTimeout


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_report_follows_after_5_10_and_20_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    wait = Wait(300)
    wait.start("rank 3")
    for second in range(50):
        clock.now = second
        wait.report()
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for rank 3: {seconds} s of at most 300 s (world.timeout)" for seconds in (5, 10, 20, 40)
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_start_begins_anew(clock: Clock) -> None:
    wait = Wait(10)
    clock.now = 9
    assert wait.seconds_left == 1
    wait.start("rank 0", extra=5)
    assert wait.seconds_left == 15
    clock.now = 30
    assert (wait.seconds_left, wait.is_over) == (0, True)


def test_run_returns_and_raises_what_the_work_does() -> None:
    def fail() -> None:
        raise KeyError("x")

    before = set(threading.enumerate())
    assert Wait(10).run(lambda: 3) == 3
    with pytest.raises(KeyError):
        Wait(10).run(fail)
    assert set(threading.enumerate()) <= before


def test_run_ends_although_the_work_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.1)
    free = threading.Event()
    with pytest.raises(WaitTimeout):
        Wait(0.1).run(free.wait)
    began = time.monotonic()
    with pytest.raises(WaitTimeout):
        Wait(60).run(free.wait, is_broken_off=lambda: True)
    assert time.monotonic() - began < 10
    free.set()
