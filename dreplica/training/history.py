"""History of the training loop since the last agreed snapshot, from which recent steps are replayed."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dreplica.agreement.protocol import CombinedDigest
from dreplica.state.plain_state import PlainState
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state
from dreplica.state.snapshot import Snapshot, copy_evaluated_state, take_snapshot
from dreplica.training.original import Original, StepMeter


@dataclass(frozen=True)
class StepEntry:
    """History entry: a training step."""

    step: int
    """Number of the step in the run, from 1."""
    epoch: int
    """Number of the epoch, from 1."""
    number: int
    """Position of the batch in its epoch, from 0."""
    indices: Tensor
    """Sample indices that this replica received, shape (batch,), int64."""
    word: CombinedDigest | None
    """Combined digest of this replica's state after the step. None if the step was not compared."""


@dataclass(frozen=True)
class EpochEntry:
    """History entry: the end of an epoch's training, after which the scheduler stepped."""

    epoch: int
    """Number of the epoch, from 1."""


@dataclass(frozen=True)
class EvaluationEntry:
    """History entry: an evaluation, whose forward passes may have drawn random numbers or changed attributes."""

    rng: dict[str, Any]
    """State of the global generators after the evaluation."""
    plain: PlainState
    """Module attributes and small buffers after the evaluation."""


class History:
    """The last agreed snapshot and everything that the training loop has done since.

    Args:
        replica: The replica that is trained.
        every: Steps between snapshots. 0 to keep no history.

    Attributes:
        snapshot: The last snapshot whose step is known to agree. None without a history.
        entries: Steps, ends of epochs and evaluations since the snapshot, in order.
        originals: The newest steps as they ran, by number, until they are known to agree.
        meter: Reads the counters that each step moves. None without a history.
    """

    def __init__(self, replica: Replica, every: int) -> None:
        self.snapshot: Snapshot | None = None
        self.entries: list[StepEntry | EpochEntry | EvaluationEntry] = []
        self._replica = replica
        self._every = every
        self._candidate: Snapshot | None = None
        self.originals: dict[int, Original] = {}
        self.meter = StepMeter(replica) if every else None
        if every:
            self.snapshot = take_snapshot(replica)

    def step(self, entry: StepEntry, agreed_until: int, original: Original | None = None) -> None:
        """Record a step.

        Args:
            entry: The step.
            agreed_until: The last step on which replicas are known to agree.
            original: The step as it ran. It is kept until the step is known to agree.
        """
        if not self._every:
            return
        self.entries.append(entry)
        self.settle(agreed_until)
        if original is not None:
            self.originals[entry.step] = original
        self._promote(agreed_until)
        if (
            self._candidate is None
            and self.snapshot is not None
            and entry.step - self.snapshot.steps_done >= self._every
        ):
            self._candidate = take_snapshot(self._replica)
            self._promote(agreed_until)

    def settle(self, agreed_until: int) -> None:
        """Drop what is kept of steps that are known to agree."""
        self.originals = {step: kept for step, kept in self.originals.items() if step > agreed_until}

    def epoch_end(self, epoch: int) -> None:
        """Record the end of an epoch's training."""
        if self._every:
            self.entries.append(EpochEntry(epoch))

    def evaluated(self) -> None:
        """Record an evaluation of the replica."""
        if self._every:
            self.entries.append(EvaluationEntry(get_rng_state(), copy_evaluated_state(self._replica)))

    def _promote(self, agreed_until: int) -> None:
        """Make the candidate the snapshot once its step is known to agree, and drop the entries before it."""
        candidate = self._candidate
        if candidate is None or candidate.steps_done > agreed_until:
            return
        self.snapshot, self._candidate = candidate, None
        kept = 0
        for number, entry in enumerate(self.entries):
            if isinstance(entry, StepEntry) and entry.step == candidate.steps_done:
                kept = number + 1
        self.entries = self.entries[kept:]
