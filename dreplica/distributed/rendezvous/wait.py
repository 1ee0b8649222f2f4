"""Waits for other processes, which are bounded and say whom they wait for."""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

REPORT_SECONDS = 5.0
"""Seconds until a wait is reported for the first time. The next reports follow after twice the time, and so on."""
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 5.0
"""Seconds that the work of a wait has left, after its end, to raise a better error itself."""


class WaitTimeout(Exception):
    """The work of a wait did not end in time: it is blocked, such as by a process that is suspended."""


class Wait:
    """A wait for other processes.

    Args:
        timeout: Longest wait, in seconds.

    Attributes:
        who: Whom it waits for, for messages, such as `rank 3`. Kept up to date by the work.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.who = ""
        self.start("")

    def start(self, who: str, report_after: float = REPORT_SECONDS, extra: float = 0.0) -> None:
        """Begin to wait for other processes, for the whole timeout.

        Args:
            who: Whom it waits for.
            report_after: Seconds until the wait is reported for the first time.
            extra: Seconds in addition to the timeout, to learn from another process how its own wait ended.
        """
        self.who = who
        self._since = time.monotonic()
        self._end = self._since + self.timeout + extra
        self._next_report = report_after

    @property
    def seconds_left(self) -> float:
        """Seconds until the end. At least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        """True once the timeout has passed."""
        return self.seconds_left == 0

    def report(self) -> None:
        """Log whom it waits for, if the wait has lasted long enough since the last report."""
        elapsed = time.monotonic() - self._since
        if elapsed >= self._next_report and self.who and not self.is_over:
            while self._next_report <= elapsed:
                self._next_report *= 2
            log.warning("waiting for %s: %.0f s of at most %g s (world.timeout)", self.who, elapsed, self.timeout)

    def run(self, work: Callable[[], T], is_broken_off: Callable[[], bool] = bool) -> T:
        """Run `work` in a thread and return its result, and report meanwhile whom it waits for.

        Args:
            work: Waits for other processes, calls `start`, and ends soon after the timeout. It may be blocked: a
                request to a process that is suspended never returns.
            is_broken_off: Returns True once the wait is in vain.

        Raises:
            WaitTimeout: If `work` is blocked after the timeout, or the wait is in vain.
        """
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        thread = threading.Thread(target=run, name="dreplica-wait", daemon=True)
        thread.start()
        while not concurrent.futures.wait([result], _POLL_SECONDS).done:
            if is_broken_off() or time.monotonic() > self._end + _GRACE_SECONDS:
                raise WaitTimeout(self.who)
            self.report()
        thread.join()
        return result.result()
