"""Detection of failed replicas, which the other replicas can name within seconds.

A gloo collective that fails does not say which peer is missing, and a replica that waits for a survivor does not notice
a failure at all. So each replica runs a small thread that checks the store for an alarm a few times per second. When
there is one, the thread answers with the replica's current step and whether it is waiting for the others. A replica
that does not answer is lost. If all replicas answer, those that wait for no other replica hang: the others wait for
them.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.errors import DreplicaError, ExitCode

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 5.0

LossCode = Literal["no-response", "raised", "unusable", "hung", "store-no-response", "store-lost"]
"""Reasons for which a replica counts as lost.

no-response: its process ended without a report, or does not respond.
raised: it raised an exception.
unusable: its config, data, arguments or environment are unusable.
hung: its process responds, but the other replicas wait for it.
store-no-response: it serves the rendezvous store, and the store does not respond.
store-lost: it served the rendezvous store, and the connection to the store broke.
"""


@dataclass(frozen=True)
class Lost:
    """A replica that ended, failed or hangs, and why."""

    replica_id: int
    """Global rank of the lost replica."""
    code: LossCode = "no-response"
    """Reason of the loss, for programs."""
    step: int | None = None
    """Last step that the replica is known to have completed."""
    failure: Failure | None = None
    """Exception that the replica reported, with the codes `raised` and `unusable`."""
    detail: str = ""
    """First line of the store's error, with the code `store-lost`."""

    @property
    def reason(self) -> str:
        """Reason of the loss, for people."""
        match self.code:
            case "raised":
                return f"raised {self.failure}"
            case "unusable":
                return "" if self.failure is None else self.failure.message
            case "hung":
                when = "before the first step" if self.step is None else f"after step {self.step}"
                return f"hangs {when}: its process responds, but the other replicas wait for it"
            case "store-no-response":
                return "no response from the rendezvous store, which this replica serves"
            case "store-lost":
                return f"the rendezvous store, which this replica served, is gone ({self.detail})"
            case _:
                return "no response: the process was killed or its host is down"

    @property
    def raised(self) -> bool:
        """True if the replica raised an exception, which `failure` has."""
        return self.code == "raised"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the reason as a dictionary of JSON values."""
        return asdict(self) | {"reason": self.reason}


class ReplicaLost(DreplicaError, RuntimeError):
    """A collective failed since some replica ended, failed or does not respond.

    `code` is `alarm` (another replica reported a failure), `connection-lost` or `timeout`. The fields `ranks` and
    `reasons` (rank to `LossCode`) are there once the lost replicas are known.

    Args:
        text: The message for people.
        code: Stable identifier for programs.
        lost: The lost replicas, where they are known already.
        **fields: The data that the text is made from.

    Attributes:
        lost: The lost replicas, or an empty tuple while they are unknown.
    """

    default_code = "replica-lost"

    def __init__(self, text: str = "", *, code: str | None = None, lost: Sequence[Lost] = (), **fields: Any) -> None:
        super().__init__(text, code=code, **fields)
        self.lost: tuple[Lost, ...] = ()
        self.set_lost(lost)

    def set_lost(self, lost: Sequence[Lost]) -> None:
        """Add the lost replicas, once they are known."""
        self.lost = tuple(lost)
        self.fields["ranks"] = [item.replica_id for item in lost]
        self.fields["reasons"] = {item.replica_id: item.code for item in lost}


class LivenessMonitor:
    """Alarm and liveness check of all replicas, over a `torch.distributed` store.

    Args:
        store: The store that all replicas share.
        replica_id: Global rank of this process.
        num_replicas: Number of replicas.
        holds_store: Whether this process serves the store itself: rank 0 without torchrun, whose store outlives all
            replicas. It then stays until the others have read what they need.
        last_seconds: Seconds after an alarm until this process is ended, even if its main thread is blocked. None to
            never end it.

    Attributes:
        alarm: Set once any replica has raised the alarm.
        step: Last step that this replica has completed, kept up to date by the training loop.
        waiting: Whether this replica waits for the others in a collective, kept up to date by the channel.
    """

    def __init__(
        self,
        store: dist.Store,
        replica_id: int,
        num_replicas: int,
        holds_store: bool = False,
        last_seconds: float | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.num_replicas = num_replicas
        self.alarm = threading.Event()
        self.step: int | None = None
        self.waiting = False
        self._store = store.clone()
        self._holds_store = holds_store
        self._last_seconds = last_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="dreplica-liveness", daemon=True)
        self._thread.start()

    def report_failure(self, error: BaseException, unusable: bool = False) -> bool:
        """Report to the other replicas that this one fails, before it ends.

        Args:
            error: The exception that this replica fails with.
            unusable: Whether the cause is unusable config, data, arguments or environment.

        Returns:
            True if this replica is the first to report a failure.
        """
        row = {
            "step": self.step,
            "code": "unusable" if unusable else "raised",
            "failure": Failure.from_exception(error).as_dict(),
        }
        try:
            self._store.set(f"liveness/failed/{self.replica_id}", json.dumps(row))
            first = self._store.add("liveness/failures", 1) == 1
            self._store.set("liveness/alarm", "1")
        except RuntimeError as store_error:
            log.debug("cannot reach the rendezvous store: %s", store_error)
            return True
        return first

    def find_lost(self) -> list[Lost]:
        """Raise the alarm, wait a few seconds for answers and return the lost replicas."""
        result: Future[list[Lost]] = Future()
        # In a thread: a request to a store whose process is suspended never returns.
        threading.Thread(target=self._find_lost, args=(result,), name="dreplica-find-lost", daemon=True).start()
        try:
            return result.result(2 * _ANSWER_SECONDS + 1)
        except TimeoutError:
            return [Lost(0, "store-no-response")]
        except RuntimeError as error:
            return [Lost(0, "store-lost", detail=str(error).partition("\n")[0])]

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join(_ANSWER_SECONDS)

    def _listen(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                if not self._store.check(["liveness/alarm"]):
                    continue
                answer = {"step": self.step, "waiting": self.waiting}
                self._store.set(f"liveness/answer/{self.replica_id}", json.dumps(answer))
            except RuntimeError as error:
                log.debug("cannot reach the rendezvous store: %s", error)
            self.alarm.set()
            if self._last_seconds is not None and not self._closed.wait(self._last_seconds):
                os._exit(ExitCode.FAILED)
            return

    def _find_lost(self, result: "Future[list[Lost]]") -> None:
        try:
            self._store.set("liveness/alarm", "1")
            answers, failed = self._collect()
            self._store.set(f"liveness/done/{self.replica_id}", "{}")
            if self._holds_store:
                self._wait_for_readers(answers.keys() | failed.keys())
        except RuntimeError as error:
            result.set_exception(error)
            return
        lost = [
            _reported(i, failed[i]) if i in failed else Lost(i)
            for i in range(self.num_replicas)
            if i in failed or i not in answers
        ]
        hung = [Lost(i, "hung", answer["step"]) for i, answer in answers.items() if not answer["waiting"]]
        result.set_result(lost or hung)

    def _collect(self) -> tuple[dict[int, dict], dict[int, dict]]:
        """Return the answers and the reported failures, each by replica id."""
        end = time.monotonic() + _ANSWER_SECONDS
        while True:
            answers, failed = self._read("answer"), self._read("failed")
            if len(answers.keys() | failed.keys()) == self.num_replicas or time.monotonic() > end:
                return answers, failed
            time.sleep(_POLL_SECONDS / 2)

    def _wait_for_readers(self, present: Iterable[int]) -> None:
        end = time.monotonic() + _ANSWER_SECONDS
        while set(present) - self._read("done").keys() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS / 2)

    def _read(self, kind: str) -> dict[int, dict]:
        keys = {i: f"liveness/{kind}/{i}" for i in range(self.num_replicas)}
        return {i: json.loads(self._store.get(key)) for i, key in keys.items() if self._store.check([key])}


def _reported(replica_id: int, row: dict[str, Any]) -> Lost:
    return Lost(replica_id, row["code"], row["step"], Failure.from_dict(row["failure"]))


def find_lost_replicas(monitor: LivenessMonitor | None, error: BaseException) -> list[Lost]:
    """Return the lost replicas, this one included, after an exception on this one.

    Reports `error` to the other replicas, unless it is a `ReplicaLost`, to which the lost replicas are added.
    """
    if monitor is None:
        return [Lost(0, "raised", failure=Failure.from_exception(error))]
    if not isinstance(error, ReplicaLost):
        monitor.report_failure(error)
    lost = monitor.find_lost()
    if isinstance(error, ReplicaLost):
        error.set_lost(lost)
    return lost


def is_reporter(lost: Sequence[Lost], replica_id: int, num_replicas: int) -> bool:
    """Return True on the one replica that reports the loss.

    Args:
        lost: The lost replicas.
        replica_id: Global rank of this process.
        num_replicas: Number of replicas, the lost ones included.

    Returns:
        True on the survivor with the lowest rank, or on rank 0 where no replica survives.
    """
    gone = {item.replica_id for item in lost}
    return replica_id == min((i for i in range(num_replicas) if i not in gone), default=0)


def exit_code_of(lost: Sequence[Lost]) -> ExitCode:
    """Return the exit code of the survivors.

    It is `UNUSABLE` if unusable input ended all lost replicas.
    """
    return ExitCode.UNUSABLE if lost and all(item.code == "unusable" for item in lost) else ExitCode.FAILED
