"""A request to stop is a flag that the loop reads; it never interrupts a step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreplica.errors import ExitCode

_SAME_INTERRUPT_SECONDS = 3.0
_LOOK_SECONDS = 0.1


_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGHUP or SIGUSR2; carried to all replicas by the agreement message."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


class StoppedOnRequest(Exception):
    """Some replica was told to stop, and all have; raised on all of them."""


def block_stop_signals() -> None:
    """Keeps signals that ask to stop from this process until `stop_signals` hears them: it then learns of them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


@contextmanager
def exit_after_signal(seconds: float) -> Iterator[None]:
    """Ends this process if it is still inside `seconds` after a signal that `block_stop_signals` keeps from it.

    For a wait for other processes that cannot be cut short, and that goes on for good if one of them is gone.
    """
    left = threading.Event()

    def watch() -> None:
        told_at: float | None = None
        while not left.wait(_LOOK_SECONDS):
            if told_at is None and signal.sigpending() & set(_NUMBERS):
                told_at = time.monotonic()
            if told_at is not None and time.monotonic() - told_at > seconds:
                os._exit(ExitCode.FAILED)

    thread = threading.Thread(target=watch, name="dreplica-told", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGUSR2 into a `StopRequest`; a second Ctrl-C interrupts at once.

    One Ctrl-C may reach a worker twice: from the terminal, and passed on by its launcher. So the second SIGINT only
    counts when it comes some seconds later.
    """
    request = StopRequest()
    interrupted_at: float | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted_at
        if number == signal.SIGINT:
            if interrupted_at is not None and time.monotonic() - interrupted_at > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            interrupted_at = interrupted_at or time.monotonic()
        request.signal_name = request.signal_name or signal.Signals(number).name

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
    before = {number: signal.signal(number, handle) for number in _NUMBERS if number not in ignored}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP are a KeyboardInterrupt, so that what is running is ended first."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
