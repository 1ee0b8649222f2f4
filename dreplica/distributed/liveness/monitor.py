"""Detection of failed replicas, which the other replicas can name within seconds.

A gloo collective that fails does not say which peer is missing, and a replica that waits for a survivor does not notice
a failure at all. So each replica runs a small thread that polls the rendezvous store for calls, a few times per second.
It answers each call with a heartbeat: its step, whether it waits for the others and, if it does not, its Python stack.

A replica that waits for some seconds makes a call and logs for whom it waits. A replica that lost a connection, waited
for too long or fails makes a call of the kind "alarm". Then one replica reads all heartbeats and publishes which
replicas are lost: those that do not answer or reported a failure. If there are none, those that wait for no other
replica hang, since the others wait for them. An alarm after which all replicas answer and wait is ignored.

Each replica makes a constant number of requests to the store, for any number of replicas.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.check import LivenessCheck
from dreplica.distributed.liveness.lost import LossCode, Losses, Lost, ReplicaLost
from dreplica.distributed.liveness.notes import ALARM, ASK, Notes
from dreplica.distributed.liveness.polling_thread import PollingThread
from dreplica.distributed.liveness.stack import stack_of
from dreplica.distributed.liveness.wait_notice import FIRST_NOTICE_SECONDS, GroupWait, WaitNotice
from dreplica.errors import ExitCode

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_STORE_SECONDS = 10.0
"""Longest wait for the store. A request to a store whose process is suspended never returns."""
_CLOSE_SECONDS = 5.0
_KEPT_CALLS = 8

Noticed = Literal["connection-lost", "timeout", "reported"]
"""How the replica that raised the alarm noticed a loss."""


class LivenessMonitor:
    """Heartbeat, alarm and liveness check of all replicas, over a `torch.distributed` store.

    Only its thread uses the store. After a fork, the child's copy does nothing.

    Args:
        store: The store that all replicas share.
        replica_id: Global rank of this process.
        num_replicas: Number of replicas, whose global ranks are 0, 1, 2, ...
        holds_store: Whether this process serves the store itself: rank 0 without torchrun, whose store outlives all
            replicas. It then stays until the others have read what they need.
        last_seconds: Seconds after an alarm until this process is ended, even if its main thread is blocked. None to
            never end it.
        ranks: Global ranks of the replicas, if they are not all ranks.
        announces: Whether to log a loss if this replica does not wait for the others, and so may never raise it.
        is_open: Returns False once the process group is gone. The thread then ends.
        store_rank: Global rank that serves the store, and counts as lost if the store is. None if the launcher does.

    Attributes:
        alarm: Set while any replica has raised the alarm.
        step: Last step that this replica has taken, kept up to date by the training loop.
        finishing: Whether this replica has taken its last step.
    """

    def __init__(
        self,
        store: dist.Store,
        replica_id: int,
        num_replicas: int,
        holds_store: bool = False,
        last_seconds: float | None = None,
        ranks: Sequence[int] | None = None,
        announces: bool = False,
        is_open: Callable[[], bool] = lambda: True,
        store_rank: int | None = 0,
    ) -> None:
        self.replica_id = replica_id
        self.ranks = tuple(range(num_replicas)) if ranks is None else tuple(ranks)
        self.alarm = threading.Event()
        self.step: int | None = None
        self.finishing = False
        self.losses: Losses | None = None
        self._compared: int | None = None
        self._notes = Notes(store.clone())
        self._notice = WaitNotice(self._notes, self.ranks, replica_id == self.ranks[0])
        self._holds_store, self._last_seconds = holds_store, last_seconds
        self._announces, self._is_open, self._store_rank = announces, is_open, store_rank
        self._wait: GroupWait | None = None
        self._num_waits = 0
        self._watched = threading.get_ident()
        self._call = 0
        self._called: dict[int, float] = {}
        self._reported = self._resting = self._has_watched = False
        self._thread = PollingThread("dreplica-liveness", _POLL_SECONDS, self._poll, self._store_lost)

    @property
    def waiting(self) -> bool:
        """True while this replica waits for the others in a collective."""
        return self._wait is not None

    @waiting.setter
    def waiting(self, value: bool) -> None:
        if value:
            self._watched = threading.get_ident()
            self._num_waits += 1
            self._wait = GroupWait(self._num_waits, time.monotonic())
            self.rest(False)
        else:
            self._wait, self._compared = None, self.step

    def rest(self, value: bool) -> None:
        """Stop polling the store until the next wait, or poll it again."""
        self._resting = value

    def report_failure(self, error: BaseException, unusable: bool = False) -> bool:
        """Report to the other replicas that this one fails, before it ends.

        Args:
            error: The exception that this replica fails with.
            unusable: Whether the cause is unusable config, data, arguments or environment.

        Returns:
            True if this replica is the first to report a failure.
        """
        return self.report_end("unusable" if unusable else "raised", error)

    def report_end(self, code: LossCode, error: BaseException | None = None) -> bool:
        """Report to the other replicas that this one takes no further step.

        Args:
            code: Why. It is the reason of the loss if another replica waits for this one.
            error: The exception that this replica fails with, if there is one. Then the alarm is raised.

        Returns:
            True if this replica is the first to report a failure.
        """
        failure = None if error is None else Failure.from_exception(error).as_dict()
        row = {"rank": self.replica_id, "step": self.step, "code": code, "failure": failure}

        def report() -> bool:
            self._reported = True
            self._notes.append("ends", row)
            if error is None:
                return False
            first = self._notes.count("failures") == 1
            self._raise_alarm("reported")
            return first

        try:
            return self._thread.submit(report).result(_STORE_SECONDS)
        except (TimeoutError, RuntimeError) as store_error:
            log.debug("cannot reach the rendezvous store: %s", store_error)
            return error is not None

    def find_lost(self, noticed: Noticed = "connection-lost") -> list[Lost]:
        """Raise the alarm, wait a few seconds for answers and return the lost replicas.

        Args:
            noticed: How this replica noticed a loss.
        """

        def find() -> None:
            if self.losses is None:
                self._hold_check(self._raise_alarm(noticed))

        return self._lost_after(find)

    def join_check(self) -> list[Lost]:
        """Wait for the end of the liveness check after an alarm and return the lost replicas."""
        return self._lost_after(lambda: None)

    def watch_store(self) -> None:
        """Log once if the store has not responded for some seconds, since the thread then cannot log anything."""
        seconds = self._notes.pending_seconds
        if seconds > FIRST_NOTICE_SECONDS and not self._has_watched:
            self._has_watched = True
            whose = "the launcher" if self._store_rank is None else f"replica {self._store_rank}"
            log.warning("waiting for %.0f s for the rendezvous store, which %s serves", seconds, whose)

    def replica_lost(self, noticed: str, code: str, **fields: Any) -> ReplicaLost:
        """Return the error that names the replicas that the liveness check has found.

        Args:
            noticed: How this replica noticed the loss, for people.
            code: The same, for programs.
            **fields: Further data.
        """
        return (self.losses or Losses()).error(self.replica_id, self.step, noticed, code, **fields)

    def close(self) -> None:
        """Stop the thread and close the connection to the store."""
        if self._thread.close(_CLOSE_SECONDS):
            self._notes.close()

    def _lost_after(self, action: Callable[[], None]) -> list[Lost]:
        future = self._thread.submit(action)
        code: LossCode = "store-lost"
        detail, silent = "", None
        while True:
            try:
                future.result(2 * _POLL_SECONDS)
            except TimeoutError:
                silent = self._notes.pending_seconds
                if silent < _STORE_SECONDS:
                    continue
                code = "store-no-response"
            except RuntimeError as error:
                detail = str(error).partition("\n")[0]
            else:
                return [] if self.losses is None else list(self.losses.lost)
            if self.losses is None and self._store_rank is not None:
                self.losses = Losses((Lost(self._store_rank, code, detail=detail, silent=silent),))
            return [] if self.losses is None else list(self.losses.lost)

    def _store_lost(self, error: RuntimeError) -> None:
        log.debug("cannot reach the rendezvous store: %s", error)
        self.alarm.set()
        self._end_process_later(time.monotonic())

    def _poll(self) -> bool:
        """Answer a call, if there is one, and return False to end the thread."""
        if not self._is_open():
            self._notes.close()
            return False
        if self._resting or self.losses is not None:
            return True
        kind = self._notes.call(self._call)
        if kind == ASK:
            self._answer()
        elif kind is not None:
            self._hold_check(kind)
        wait = self._wait
        if wait is not None:
            self._notice.update(wait, self.step, self._called, self._ask)
        return True

    def _ask(self) -> int | None:
        """Ask all replicas for a heartbeat."""
        number = self._call
        if self._notes.make_call(number, ASK) != ASK:
            return None
        self._answer()
        self._notes.forget(f"answers/{number - _KEPT_CALLS}")
        return number

    def _answer(self) -> None:
        """Answer the next call with a heartbeat."""
        busy = self._wait is None
        row = {
            "rank": self.replica_id,
            "step": self.step,
            "compared": self._compared,
            "waiting": not busy,
            "finishing": self.finishing,
            "stack": stack_of(self._watched) if busy else [],
        }
        self._notes.append(f"answers/{self._call}", row)
        self._called[self._call] = time.monotonic()
        self._called.pop(self._call - _KEPT_CALLS, None)
        self._call += 1

    def _raise_alarm(self, noticed: Noticed) -> str:
        """Raise the alarm, unless it is raised already, and return the kind of the call."""
        while (kind := self._notes.make_call(self._call, f"{ALARM} {noticed}")) == ASK:
            self._answer()
        return kind

    def _hold_check(self, kind: str) -> None:
        """Take part in the liveness check after an alarm."""
        started, number, busy = time.monotonic(), self._call, self._wait is None
        self._answer()
        if self.losses is not None:
            return
        self.alarm.set()
        check = LivenessCheck(self._notes, number, self.ranks, self._called, timed_out=kind.endswith("timeout"))
        losses = check.hold(self._holds_store)
        if not losses.lost:
            self.alarm.clear()
            return
        self.losses = losses
        is_failure = any(item.code not in {"ended", "finished"} for item in losses.lost)
        if self._announces and busy and is_failure and not self._reported:
            log.warning("a replica was lost:\n%s", losses.describe())
        self._end_process_later(started)

    def _end_process_later(self, started: float) -> None:
        """End this process some seconds after the alarm, unless the monitor is closed before."""
        if self._last_seconds is not None:
            end = started + self._last_seconds
            threading.Thread(target=self._end_process, args=(end,), name="dreplica-last-seconds", daemon=True).start()

    def _end_process(self, end: float) -> None:
        if not self._thread.wait_closed(max(0.0, end - time.monotonic())):
            os._exit(ExitCode.FAILED)


def find_lost_replicas(monitor: LivenessMonitor | None, error: BaseException) -> list[Lost]:
    """Return the lost replicas, this one included, after an exception on this one.

    Reports `error` to the other replicas, unless it is a `ReplicaLost`, to which the lost replicas are added.
    """
    if monitor is None:
        return [Lost(0, "raised", failure=Failure.from_exception(error))]
    if isinstance(error, ReplicaLost) and error.lost:
        return list(error.lost)
    if not isinstance(error, ReplicaLost):
        monitor.report_failure(error)
    lost = monitor.find_lost()
    if isinstance(error, ReplicaLost):
        error.set_lost(lost)
    return lost
