"""Log lines about a replica that waits: for whom, for how long, and what the others do."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreplica.distributed.liveness.check import by_rank, silent_seconds
from dreplica.distributed.liveness.notes import Notes
from dreplica.distributed.liveness.stack import innermost

log = logging.getLogger(__name__)

FIRST_NOTICE_SECONDS = 5.0
_FIRST_ASK_SECONDS = 2.0
_ANSWER_SECONDS = 1.0
_LATER_SECONDS = 0.5
"""Seconds by which the other replicas let rank 0 speak first."""
_MAX_NAMED = 4


@dataclass(frozen=True)
class GroupWait:
    """A wait for the other replicas."""

    number: int
    """Position in the sequence of waits, the same on all replicas."""
    since: float
    """When it began, on the monotonic clock."""


class WaitNotice:
    """Notices about one wait after another, of which one replica logs each.

    A notice is due after 5, 10, 20, ... seconds. Heartbeats are also asked for after 2 seconds, so that it is known for
    how long a replica is silent.

    Args:
        notes: The notes that all replicas share.
        ranks: Global ranks of all replicas.
        is_first: Whether this replica has the lowest rank.
    """

    def __init__(self, notes: Notes, ranks: Sequence[int], is_first: bool) -> None:
        self._notes, self._ranks = notes, ranks
        self._delay = 0.0 if is_first else _LATER_SECONDS
        self._number = self._num_asked = 0
        self._asked: tuple[int, float] | None = None

    def update(
        self, wait: GroupWait, step: int | None, called: Mapping[int, float], ask: Callable[[], int | None]
    ) -> None:
        """Ask for heartbeats if that is due, or log those that were asked for.

        Args:
            wait: The current wait.
            step: The step of this replica.
            called: When the newest calls were made, by number, on the monotonic clock.
            ask: Makes a call to all replicas, and returns its number or None if there is an alarm.
        """
        now = time.monotonic()
        if wait.number != self._number:
            self._number, self._num_asked, self._asked = wait.number, 0, None
        if self._asked is not None:
            number, asked_at = self._asked
            if now - asked_at < _ANSWER_SECONDS:
                return
            self._asked = None
            if now - wait.since >= FIRST_NOTICE_SECONDS:
                self._log(by_rank(self._notes, f"answers/{number}"), now - wait.since, step, called, now - asked_at)
        count = self._num_asked
        due = FIRST_NOTICE_SECONDS * 2.0 ** (count - 1) if count else _FIRST_ASK_SECONDS
        if now - wait.since >= due + self._delay:
            self._num_asked += 1
            if self._notes.count(f"waits/{wait.number}/{count}") == 1:
                number_or_none = ask()
                self._asked = None if number_or_none is None else (number_or_none, now)

    def _log(
        self,
        rows: Mapping[int, Mapping[str, Any]],
        seconds: float,
        step: int | None,
        called: Mapping[int, float],
        age: float,
    ) -> None:
        awaited = [rank for rank in self._ranks if rank not in rows or not rows[rank]["waiting"]]
        if not awaited:
            return
        silent = silent_seconds(self._notes, called, [rank for rank in awaited if rank not in rows])
        named = [_describe(rank, rows.get(rank), silent.get(rank, age), age) for rank in awaited[:_MAX_NAMED]]
        if len(awaited) > _MAX_NAMED:
            named.append(f"and {len(awaited) - _MAX_NAMED} more")
        when = "" if step is None else f" at step {step}"
        log.warning("waiting for %s for %.0f s%s", ", ".join(named), seconds, when)


def _describe(rank: int, row: Mapping[str, Any] | None, silent: float, age: float) -> str:
    if row is None:
        return f"replica {rank} (no heartbeat for {silent:.0f} s)"
    step = "before the first step" if row["step"] is None else f"after step {row['step']}"
    place = f", at {innermost(row['stack'])}" if row["stack"] else ""
    return f"replica {rank} ({step}, last heartbeat {age:.1f} s ago{place})"
