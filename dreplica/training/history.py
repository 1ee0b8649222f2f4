"""What is needed to run recent steps again: the last agreed snapshot and what has been done since."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dreplica.agreement.protocol import CombinedDigest
from dreplica.state.plain_state import PlainState
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state
from dreplica.state.snapshot import Snapshot, copy_evaluated_state, take_snapshot


@dataclass(frozen=True)
class StepEntry:
    """A step that was taken."""

    step: int
    epoch: int
    number: int
    """Of the batch in its epoch, from 0."""
    indices: Tensor
    """(batch,) int64: the samples, as this replica received them."""
    word: CombinedDigest | None
    """Over this replica's state after the step, as compared; None if the step was not compared."""
    generator: bytes = b""
    """State of torch's CPU generator after the step."""


@dataclass(frozen=True)
class EpochEntry:
    """An epoch's training was over, and the scheduler stepped."""

    epoch: int


@dataclass(frozen=True)
class EvaluationEntry:
    """The replica was evaluated: in eval mode, too, a forward pass may draw numbers or count."""

    rng: dict[str, Any]
    """The generators afterwards,"""
    plain: PlainState
    """and what else it may have changed."""


class History:
    """Kept by the training loop; `every`: steps between snapshots, 0 for no history."""

    def __init__(self, replica: Replica, every: int) -> None:
        self.snapshot: Snapshot | None = None
        self.entries: list[StepEntry | EpochEntry | EvaluationEntry] = []
        self._replica = replica
        self._every = every
        self._candidate: Snapshot | None = None
        if every:
            self.snapshot = take_snapshot(replica)

    def step(self, entry: StepEntry, agreed_until: int) -> None:
        """Records a step. `agreed_until`: the last step that all replicas are known to have agreed on."""
        if not self._every:
            return
        self.entries.append(entry)
        self._promote(agreed_until)
        if (
            self._candidate is None
            and self.snapshot is not None
            and entry.step - self.snapshot.steps_done >= self._every
        ):
            self._candidate = take_snapshot(self._replica)
            self._promote(agreed_until)

    def epoch_end(self, epoch: int) -> None:
        """Records the end of an epoch's training."""
        if self._every:
            self.entries.append(EpochEntry(epoch))

    def evaluated(self) -> None:
        """Records that the replica has been evaluated."""
        if self._every:
            self.entries.append(EvaluationEntry(get_rng_state(), copy_evaluated_state(self._replica)))

    def _promote(self, agreed_until: int) -> None:
        """A snapshot counts once its step is known to have agreed; what came before it is forgotten."""
        candidate = self._candidate
        if candidate is None or candidate.steps_done > agreed_until:
            return
        self.snapshot, self._candidate = candidate, None
        kept = 0
        for number, entry in enumerate(self.entries):
            if isinstance(entry, StepEntry) and entry.step == candidate.steps_done:
                kept = number + 1
        self.entries = self.entries[kept:]
