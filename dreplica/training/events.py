"""Events that the training loop yields, and the timing of its phases."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreplica.state.progress import Position
from dreplica.training.evaluate import Evaluation, Tally

PHASES = ("loading", "forward", "backward", "optimizer", "checks", "saving", "evaluation")
"""Phases of an epoch whose time is measured.

`loading` is waiting for batches and moving them to the device. `checks` are fingerprints, waiting for the other
replicas, and snapshots. `saving` is checkpoints and progress output.
"""


class PhaseTimer:
    """Wall-clock time that this process spends in each phase.

    A GPU runs asynchronously, so its time counts in the phase in which the process waits for it. Where every step is
    compared, that is `checks`.

    Attributes:
        seconds: Seconds in each phase so far.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`, one of `PHASES`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


@dataclass(frozen=True)
class StepDone:
    """Event: a training step was taken."""

    step: int
    """Number of the step in the run, from 1."""
    epoch: int
    """Number of the epoch, from 1."""
    step_in_epoch: int
    """Number of the step in the epoch, from 1."""
    steps_in_epoch: int
    """Number of steps in a whole epoch."""
    tally: Tally
    """This replica's counts over the epoch so far."""
    saves: bool
    """True if `checkpoint.every_steps` asks for a checkpoint now. All replicas have then been compared."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that this replica has spent in each phase of the epoch so far."""

    @property
    def position(self) -> Position:
        """Position in the data to resume from."""
        return position_after(self.epoch, self.step_in_epoch, self.tally)


@dataclass(frozen=True)
class EpochDone:
    """Event: an epoch was trained and evaluated. Lists have one value per replica."""

    epoch: int
    """Number of the epoch, from 1."""
    step: int
    """Number of steps taken in the run."""
    train: dict[str, list[float]]
    """Training accuracy and loss."""
    val: dict[str, list[float]]
    """Validation accuracy and loss."""
    seconds: float
    """Duration of training and evaluation on this replica."""
    images_per_second: float
    """Training samples per second on this replica."""
    evaluation: Evaluation | None
    """This replica's predictions."""
    position: Position
    """Position in the data to resume from."""
    throughput: list[float] = field(default_factory=list)
    """Training samples per second on each replica."""
    timing: dict[str, list[float]] = field(default_factory=dict)
    """Seconds that each replica spent in each phase."""
    lr: list[list[float]] = field(default_factory=list)
    """Learning rates of each replica's parameter groups at the end of the epoch, equal ones once."""

    def as_dict(self) -> dict[str, Any]:
        """Return the epoch's entry in `report.json`."""
        return {"epoch": self.epoch, "train": self.train, "val": self.val}


@dataclass(frozen=True)
class Stopped:
    """Event: all replicas have stopped after the same step, because one was asked to."""

    step: int
    """Number of steps taken in the run."""
    epoch: int
    """Number of the epoch, from 1."""
    position: Position
    """Position in the data to resume from."""


def position_after(epoch: int, num_batches: int, tally: Tally) -> Position:
    """Return the position after some batches of an epoch.

    Args:
        epoch: Number of the epoch, from 1.
        num_batches: Batches of the epoch that have been trained on.
        tally: Counts over these batches.
    """
    return Position(epoch, num_batches, int(tally.correct), float(tally.loss_sum), tally.count)
