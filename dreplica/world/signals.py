"""A request to stop is a flag that the loop reads; it never interrupts a step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_INTERRUPT_SECONDS = 3.0


_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGHUP or SIGUSR2; carried to all replicas by the agreement message."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


def hold_signals() -> None:
    """Keeps signals that ask to stop from this process until `stop_signals` hears them: it then learns of them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


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
