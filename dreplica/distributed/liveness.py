"""Who is still there. When one replica fails, the others learn it within a second and can name it.

A gloo collective that misses a peer tells nothing about which replica is missing, and replicas that wait for a
survivor do not notice at all. So every replica runs one small thread which asks the store for an alarm a few times a
second and, when there is one, answers the roll with the step it is at and whether it waits for others. Whoever does
not answer is lost; if all answer, those that were waiting for nobody are the ones the others waited for.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch.distributed as dist

from dreplica.errors import ExitCode

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 5.0
_SILENT = "it ended without a word or does not respond (killed, or its host is)"


class ReplicaLost(RuntimeError):
    """A collective could not be completed: some replica ended, failed, or stayed silent for too long."""


@dataclass(frozen=True)
class Lost:
    """A replica that is gone, and what is known of how."""

    replica_id: int
    reason: str
    step: int | None = None
    """The last step it is known to have done."""
    unusable: bool = False
    """Whether it ended because of input that cannot be used."""


def describe_exception(error: BaseException) -> str:
    """What the other replicas are told of `error`."""
    return f"it raised {type(error).__name__}: {error}".removesuffix(": ")


class LivenessMonitor:
    """The alarm and the roll over a `torch.distributed` store.

    `holds_store`: whether this process serves the store itself (rank 0 without torchrun, whose store outlives all
    replicas); it then stays until the others have read what they need.

    `last_seconds`: how long after an alarm this process may still be there before it is ended, whatever its main thread
    is stuck in; None: for good.
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

    def report_failure(self, reason: str, unusable: bool = False) -> bool:
        """Tells the others that this replica is failing, and why, before it ends. Returns whether it is the first."""
        failure = {"step": self.step, "reason": reason, "unusable": unusable}
        try:
            self._store.set(f"liveness/failed/{self.replica_id}", json.dumps(failure))
            first = self._store.add("liveness/failures", 1) == 1
            self._store.set("liveness/alarm", "1")
        except RuntimeError as error:
            log.debug("the store is gone: %s", error)
            return True
        return first

    def find_lost(self) -> list[Lost]:
        """Raises the alarm, waits a few seconds for the answers, and returns who is lost."""
        result: Future[list[Lost]] = Future()
        # In a thread, because a store whose process stands still keeps whoever asks it waiting for good.
        threading.Thread(target=self._find_lost, args=(result,), name="dreplica-find-lost", daemon=True).start()
        try:
            return result.result(2 * _ANSWER_SECONDS + 1)
        except TimeoutError:
            return [Lost(0, "it holds the store that all replicas meet at, and the store does not respond")]
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            return [Lost(0, f"it held the store that all replicas meet at, and the store is gone ({reason})")]

    def close(self) -> None:
        """Ends the thread."""
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
                log.debug("the store is gone: %s", error)
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
        everyone = range(self.num_replicas)
        lost = [
            Lost(i, **failed[i]) if i in failed else Lost(i, _SILENT)
            for i in everyone
            if i in failed or i not in answers
        ]
        stuck = [
            Lost(i, f"it is alive but stuck after step {answer['step']} while the others wait for it", answer["step"])
            for i, answer in answers.items()
            if not answer["waiting"]
        ]
        result.set_result(lost or stuck)

    def _collect(self) -> tuple[dict[int, dict], dict[int, dict]]:
        """The answers, and the failures reported, by replica id."""
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


def find_lost_replicas(monitor: LivenessMonitor | None, error: BaseException) -> list[Lost]:
    """Who is gone, once this replica fails with `error` or (`ReplicaLost`) another is; tells the others the former."""
    if monitor is None:
        return [Lost(0, describe_exception(error))]
    if not isinstance(error, ReplicaLost):
        monitor.report_failure(describe_exception(error))
    return monitor.find_lost()


def is_reporter(lost: Sequence[Lost], replica_id: int, num_replicas: int) -> bool:
    """Whether it is this replica that writes down who is lost: the first survivor, or rank 0 where there is none."""
    gone = {item.replica_id for item in lost}
    return replica_id == min((i for i in range(num_replicas) if i not in gone), default=0)


def exit_code_of(lost: Sequence[Lost]) -> ExitCode:
    """That of those who are left: unusable input of another is that of all."""
    return ExitCode.UNUSABLE if lost and all(item.unusable for item in lost) else ExitCode.FAILED
