"""Who is still there. When one replica fails, the others learn it within a second and can name it.

A gloo collective that misses a peer tells nothing about which replica is missing, and replicas that wait for a
survivor do not notice at all. So every replica runs one small thread which asks the store for an alarm a few times a
second and, when there is one, answers the roll with the step it is at and whether it waits for others. Whoever does
not answer is lost; if all answer, those that were waiting for nobody are the ones the others waited for.
"""

import json
import logging
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 5.0


class ReplicaLost(RuntimeError):
    """A collective could not be completed: some replica ended, failed, or stayed silent for too long."""


@dataclass(frozen=True)
class Lost:
    """A replica that is gone, and what is known of how."""

    replica_id: int
    reason: str


class RollCall:
    """The alarm and the roll over a `torch.distributed` store that outlives the replicas (torchrun's own)."""

    def __init__(self, store: dist.Store, replica_id: int, num_replicas: int) -> None:
        self.replica_id = replica_id
        self.num_replicas = num_replicas
        self.alarm = threading.Event()
        self.step: int | None = None
        self.waiting = False
        self._store = store.clone()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="dreplica-roll-call", daemon=True)
        self._thread.start()

    def report_failure(self, reason: str) -> None:
        """Tells the others that this replica is failing, and why, before it ends."""
        try:
            self._store.set(f"roll_call/failed/{self.replica_id}", reason)
            self._store.set("roll_call/alarm", "1")
        except RuntimeError as error:
            log.debug("the store is gone: %s", error)

    def take(self) -> list[Lost]:
        """Raises the alarm, waits a few seconds for the answers, and returns who is lost."""
        try:
            self._store.set("roll_call/alarm", "1")
            answers = self._collect()
        except RuntimeError as error:
            return [Lost(0, f"it held the store that all replicas meet at, and the store is gone ({error})")]
        lost = []
        for replica_id in range(self.num_replicas):
            failed = self._read(f"roll_call/failed/{replica_id}")
            if failed is not None:
                lost.append(Lost(replica_id, failed))
            elif replica_id not in answers:
                lost.append(Lost(replica_id, "it ended without a word or does not respond (killed, or its host is)"))
        if lost:
            return lost
        return [
            Lost(replica_id, f"it is alive but stuck after step {answer['step']} while the others wait for it")
            for replica_id, answer in answers.items()
            if not answer["waiting"]
        ]

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                if not self._store.check(["roll_call/alarm"]):
                    continue
                answer = {"step": self.step, "waiting": self.waiting}
                self._store.set(f"roll_call/answer/{self.replica_id}", json.dumps(answer))
            except RuntimeError as error:
                log.debug("the store is gone: %s", error)
            self.alarm.set()
            return

    def _collect(self) -> dict[int, dict]:
        answers: dict[int, dict] = {}
        end = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < end:
            for replica_id in range(self.num_replicas):
                answer = self._read(f"roll_call/answer/{replica_id}")
                if answer is not None:
                    answers[replica_id] = json.loads(answer)
            failed = {r for r in range(self.num_replicas) if self._read(f"roll_call/failed/{r}") is not None}
            if len(answers.keys() | failed) == self.num_replicas:
                break
            time.sleep(_POLL_SECONDS / 2)
        return answers

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None
