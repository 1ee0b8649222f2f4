"""The thread that polls and runs actions."""

import os
import threading
import time

import pytest

from dreplica.distributed.liveness.polling_thread import PollingThread


def test_actions_run_in_the_thread() -> None:
    polls: list[int] = []
    thread = PollingThread("poller", 0.01, lambda: polls.append(threading.get_ident()) is None, lambda _: None)
    ident = thread.submit(threading.get_ident).result(5)
    time.sleep(0.1)
    thread.close(5)
    assert set(polls) == {ident} != {threading.get_ident()}
    assert len(polls) > 2
    assert "poller" not in [each.name for each in threading.enumerate()]
    with pytest.raises(RuntimeError, match="poller has ended"):
        thread.submit(os.getpid).result(5)


def test_submitted_actions_run_before_the_end() -> None:
    thread = PollingThread("poller", 60, lambda: True, lambda _: None)
    slow, last = thread.submit(lambda: time.sleep(0.2)), thread.submit(lambda: "ran")
    thread.close(5)
    assert (slow.result(0), last.result(0)) == (None, "ran")


def test_error_ends_the_thread_and_fails_actions() -> None:
    errors: list[RuntimeError] = []

    def fail() -> None:
        time.sleep(0.1)
        raise RuntimeError("connection reset")

    thread = PollingThread("poller", 60, lambda: True, errors.append)
    first, second = thread.submit(fail), thread.submit(lambda: None)
    for future in (first, second, thread.submit(lambda: None)):
        with pytest.raises(RuntimeError, match="connection reset"):
            future.result(5)
    assert [str(error) for error in errors] == ["connection reset"]


def test_false_from_poll_ends_the_thread() -> None:
    thread = PollingThread("poller", 0.01, lambda: False, lambda _: None)
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="poller has ended"):
        thread.submit(lambda: None).result(5)


@pytest.mark.process
def test_forked_child_runs_nothing() -> None:
    thread = PollingThread("poller", 60, lambda: True, lambda _: None)
    child = os.fork()
    if child == 0:
        try:
            failed = isinstance(thread.submit(lambda: None).exception(5), RuntimeError)
            thread.close(5)
        finally:
            os._exit(7 if failed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert thread.submit(lambda: 3).result(5) == 3
    thread.close(5)
