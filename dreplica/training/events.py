"""events"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dreplica.state.progress import Position
from dreplica.training.evaluate import Evaluation, Tally

PHASES = ("loading", "forward", "backward", "optimizer", "checks", "saving", "evaluation")
"""`loading`: waiting for batches, moved to the device. `checks`: fingerprints, waiting for the other replicas' and
snapshots. `saving`: checkpoints and progress."""


class PhaseTimer:
    """Adds up the seconds that this replica's process spends in each phase.

    A GPU works on while the process goes on: what it takes shows in the phase in which the process waits for it, which
    is that of the checks where every step is compared.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has gone by since the last call belongs to `phase`, one of `PHASES`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


@dataclass(frozen=True)
class StepDone:
    """A step was taken."""

    step: int
    epoch: int
    step_in_epoch: int
    steps_in_epoch: int
    tally: Tally
    """Of this epoch's steps so far, on this replica."""

    saves: bool
    """Whether `checkpoint.every_steps` wants a checkpoint now; all replicas are known to agree then."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """This replica's in each phase of the epoch so far, as `PhaseTimer` tells them."""

    @property
    def position(self) -> Position:
        """Where training goes on."""
        return _position(self.epoch, self.step_in_epoch, self.tally)


@dataclass(frozen=True)
class EpochDone:
    """An epoch was trained and evaluated; one value per replica in each list."""

    epoch: int
    step: int
    train: dict[str, list[float]]
    val: dict[str, list[float]]
    seconds: float
    images_per_second: float
    """Training samples of one replica per second of training."""
    evaluation: Evaluation | None
    """This replica's predictions."""
    position: Position
    """Where training goes on."""
    throughput: list[float] = field(default_factory=list)
    """`images_per_second` of every replica."""
    timing: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of every replica in each phase, as `PhaseTimer` tells them."""

    def without_predictions(self) -> "EpochDone":
        """A copy that does not keep them in memory."""
        return replace(self, evaluation=None)

    def as_dict(self) -> dict[str, Any]:
        """What report.json says of it."""
        return {"epoch": self.epoch, "train": self.train, "val": self.val}


@dataclass(frozen=True)
class Stopped:
    """A replica wanted to stop, and all have, after the same step."""

    step: int
    epoch: int
    position: Position
    """Where training goes on."""


def _position(epoch: int, num_batches: int, tally: Tally) -> Position:
    return Position(epoch, num_batches, int(tally.correct), float(tally.loss_sum), tally.count)
