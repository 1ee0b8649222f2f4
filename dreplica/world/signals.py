"""A request to stop is a flag that the loop reads; it never interrupts a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR2; carried to all replicas by the agreement message."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGINT and SIGUSR2 into a `StopRequest`; a second SIGINT interrupts at once."""
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
