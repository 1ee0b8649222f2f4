"""A thread that polls, and runs what other threads ask it to run."""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class PollingThread:
    """Daemon thread that calls `poll` now and then, and runs actions in between.

    Only this thread uses what `poll` and the actions use, such as the connection to a store. The first RuntimeError
    ends it, since a broken connection stays broken. After a fork, the child's copy runs nothing.

    Args:
        name: The thread's name.
        seconds: Time between two polls.
        poll: The function to call. Returns False to end the thread.
        ended: Called with the error that has ended the thread.
    """

    def __init__(
        self, name: str, seconds: float, poll: Callable[[], bool], ended: Callable[[RuntimeError], None]
    ) -> None:
        self._seconds, self._poll, self._on_error = seconds, poll, ended
        self._changed = threading.Condition()
        self._requests: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        self._has_ended = RuntimeError(f"the thread {name} has ended")
        self._error: RuntimeError | None = None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, action: Callable[[], T]) -> "Future[T]":
        """Let the thread run `action`.

        Returns:
            The result, which is a RuntimeError if the thread has ended.
        """
        future: Future[T] = Future()
        if self._pid != os.getpid():  # the lock may be held forever
            future.set_exception(RuntimeError("the process was forked"))
            return future
        with self._changed:
            if self._closed or self._error is not None:
                future.set_exception(self._error or self._has_ended)
            else:
                self._requests.append((action, future))
                self._changed.notify_all()
        return future

    def close(self, seconds: float) -> bool:
        """End the thread after the actions that were submitted.

        Args:
            seconds: Longest wait for its end.

        Returns:
            True if the thread runs nothing any more.
        """
        if self._pid != os.getpid():
            return False
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def wait_closed(self, seconds: float) -> bool:
        """Wait until `close` is called, and return True if it was called in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, seconds)

    def _run(self) -> None:
        error, requests = self._has_ended, []
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._requests, self._seconds)
                    requests, closed = list(self._requests), self._closed
                    self._requests.clear()
                while requests:
                    _complete(*requests.pop(0))
                if closed or not self._poll():
                    break
        except RuntimeError as raised:
            error = raised
            self._on_error(raised)
        with self._changed:
            self._error = error
            for _, future in (*requests, *self._requests):
                future.set_exception(error)
            self._requests.clear()


def _complete(action: Callable[[], T], future: "Future[T]") -> None:
    try:
        future.set_result(action())
    except RuntimeError as error:
        future.set_exception(error)
        raise
