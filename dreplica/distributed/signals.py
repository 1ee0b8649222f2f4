"""Signals to stop, as a flag that the training loop reads between steps."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreplica.errors import ExitCode

_DUPLICATE_SECONDS = 3.0
_POLL_SECONDS = 0.1

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Flag that SIGTERM, SIGINT, SIGHUP and SIGUSR2 set.

    The message that replicas exchange at each step carries it to all of them.

    Attributes:
        signal_name: Name of the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


class StoppedOnRequest(Exception):
    """All replicas have stopped since one received a signal to stop, raised on all of them."""


def block_stop_signals() -> None:
    """Block signals to stop until `stop_signals` handles them.

    None is lost, and none ends the process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextmanager
def exit_after_signal(seconds: float) -> Iterator[None]:
    """Exit the process if the body still runs some seconds after a signal to stop.

    For a wait for other processes that cannot be interrupted, and that never ends if one of them is gone.

    Args:
        seconds: Grace period after a signal that `block_stop_signals` has blocked.
    """
    left = threading.Event()

    def watch() -> None:
        received_at: float | None = None
        while not left.wait(_POLL_SECONDS):
            pending = signal.sigpending() & set(_SIGNALS)
            if received_at is None and pending:
                received_at = time.monotonic()
            if received_at is not None and time.monotonic() - received_at > seconds:
                names = ", ".join(sorted(signal.Signals(number).name for number in pending))
                print(f"error: ended by {names} while waiting for other replicas", file=sys.stderr, flush=True)
                os._exit(ExitCode.FAILED)

    thread = threading.Thread(target=watch, name="dreplica-exit-after-signal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGHUP and SIGUSR2 into a `StopRequest` inside the body.

    A second Ctrl-C raises KeyboardInterrupt. One Ctrl-C may reach a worker twice, from the terminal and from its
    launcher, so a second SIGINT only counts a few seconds after the first.

    Yields:
        The request, which is true once a signal was received.
    """
    request = StopRequest()
    interrupted_at: float | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted_at
        if number == signal.SIGINT:
            if interrupted_at is not None and time.monotonic() - interrupted_at > _DUPLICATE_SECONDS:
                raise KeyboardInterrupt
            interrupted_at = interrupted_at or time.monotonic()
        request.signal_name = request.signal_name or signal.Signals(number).name

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # as nohup does
    before = {number: signal.signal(number, handle) for number in _SIGNALS if number not in ignored}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP inside the body, so that cleanup code runs."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
