"""The liveness check after an alarm: one replica reads all heartbeats and publishes which replicas are lost."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.lost import Losses, Lost
from dreplica.distributed.liveness.notes import Notes

_ANSWER_SECONDS = 5.0
_LAST_CHANCE_SECONDS = 1.0
"""Seconds to answer the alarm for replicas that have not answered earlier calls."""
_POLL_SECONDS = 0.25
_MAX_NAP_SECONDS = 1.0
_MAX_ELECTIONS = 3


class LivenessCheck:
    """One liveness check, as one replica takes part in it after it has answered the alarm.

    Args:
        notes: The notes that all replicas share.
        number: Number of the call that raised the alarm.
        ranks: Global ranks of all replicas.
        called: When this replica answered the newest calls, by number, on the monotonic clock.
        timed_out: Whether the alarm was raised since a replica waited for too long.
    """

    def __init__(
        self, notes: Notes, number: int, ranks: tuple[int, ...], called: Mapping[int, float], timed_out: bool
    ) -> None:
        self._notes, self._number, self._ranks = notes, number, ranks
        self._called, self._timed_out = called, timed_out

    def hold(self, holds_store: bool) -> Losses:
        """Write the lost replicas to the store, or wait until another replica has.

        Args:
            holds_store: Whether this process serves the store. It then waits until the others have read the result.

        Returns:
            The published result.
        """
        result: dict[str, Any] | None = None
        for election in range(_MAX_ELECTIONS):
            if self._notes.count(f"readers/{self._number}/{election}") == 1:
                rows, ends = self._collect()
                result = self._notes.publish(f"losses/{self._number}", self._decide(rows, ends).as_dict())
            else:
                result = self._await_result(1.5 * _ANSWER_SECONDS)
            if result is not None:
                break
        self._notes.count(f"done/{self._number}")
        if holds_store:
            self._await_readers()
        return Losses() if result is None else Losses.from_dict(result)

    def _collect(self) -> tuple[dict[int, dict], dict[int, dict]]:
        """Return the heartbeats and the reported ends, each by replica id."""
        earlier = {number: at for number, at in self._called.items() if number < self._number}
        silent = silent_seconds(self._notes, earlier, self._ranks) if self._timed_out else {}
        hopeless = {rank for rank, seconds in silent.items() if seconds >= _ANSWER_SECONDS}
        started, nap = time.monotonic(), 0.05
        while True:
            rows, ends = by_rank(self._notes, f"answers/{self._number}"), by_rank(self._notes, "ends")
            missing, seconds = set(self._ranks) - rows.keys() - ends.keys(), time.monotonic() - started
            if not missing or seconds > (_LAST_CHANCE_SECONDS if missing <= hopeless else _ANSWER_SECONDS):
                return rows, ends
            time.sleep(nap)
            nap = min(2 * nap, 2 * _POLL_SECONDS)

    def _decide(self, rows: Mapping[int, dict], ends: Mapping[int, dict]) -> Losses:
        """Return the lost replicas, given the heartbeats and the reported ends."""
        finished = {i: row["step"] or 0 for i, row in rows.items() if row["finishing"] and row["waiting"]}
        absent = [i for i in self._ranks if i not in rows and i not in ends]
        if absent or ends:
            compared = max((row["compared"] for row in rows.values() if row["compared"] is not None), default=None)
            silent = silent_seconds(self._notes, self._called, absent) if self._timed_out else {}
            lost = [Lost(i, "no-response", compared, silent=silent.get(i)) for i in absent]
            lost += [_reported(i, ends[i]) for i in self._ranks if i in ends]
            return Losses(tuple(lost), finished)
        hung = sorted(i for i, row in rows.items() if not row["waiting"])
        return Losses(tuple(Lost(i, "hung", rows[i]["step"], stack=tuple(rows[i]["stack"])) for i in hung), finished)

    def _await_result(self, seconds: float) -> dict[str, Any] | None:
        end, nap = time.monotonic() + seconds, _POLL_SECONDS
        while time.monotonic() < end:
            time.sleep(nap)
            result = self._notes.published(f"losses/{self._number}")
            if result is not None:
                return result
            nap = min(2 * nap, _MAX_NAP_SECONDS)
        return None

    def _await_readers(self) -> None:
        """Wait until all replicas that answered the alarm have read the result."""
        end = time.monotonic() + _ANSWER_SECONDS
        num_readers = len(by_rank(self._notes, f"answers/{self._number}"))
        while self._notes.count(f"done/{self._number}", 0) < num_readers and time.monotonic() < end:
            time.sleep(_POLL_SECONDS / 2)


def by_rank(notes: Notes, key: str) -> dict[int, dict[str, Any]]:
    """Return the rows of a key by replica id."""
    return {row["rank"]: row for row in notes.rows(key)}


def silent_seconds(notes: Notes, called: Mapping[int, float], ranks: Iterable[int]) -> dict[int, float]:
    """Return for how long at least replicas have not answered.

    Args:
        notes: The notes that all replicas share.
        called: When the newest calls were made, by number, on the monotonic clock.
        ranks: The replicas.

    Returns:
        Seconds since the first call that each did not answer, for those that did not answer the newest one.
    """
    now = time.monotonic()
    since: dict[int, float] = {}
    silent = set(ranks)
    for number in sorted(called) if silent else ():
        answered = by_rank(notes, f"answers/{number}").keys()
        for rank in silent:
            if rank in answered:
                since.pop(rank, None)
            else:
                since.setdefault(rank, called[number])
    return {rank: now - start for rank, start in since.items()}


def _reported(replica_id: int, row: Mapping[str, Any]) -> Lost:
    failure = row["failure"] and Failure.from_dict(row["failure"])
    return Lost(replica_id, row["code"], row["step"], failure)
