"""The parts of one replica."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn


class Parts(Protocol):
    """All that a training step reads and writes, whoever takes it: the trainer's replica, or a loop of one's own."""

    model: nn.Module
    criterion: nn.Module
    steps_done: int

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """By name; the only one under ""."""

    @property
    def others(self) -> Sequence[Any]:
        """Further objects with a `state_dict`."""


@dataclass
class Replica:
    """One model with what trains it: what a `replica.factory` returns.

    `criterion` is called as `criterion(outputs, labels)`; `scheduler`, if any, steps once an epoch, or after each
    step of the optimizer where `scheduler_per` is "step": a warm-up, say. Step it in no other way: what is not here is
    not saved, compared or replayed. `scaler` is the fp16 GradScaler, which the trainer adds. `steps_done` counts
    training steps.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    steps_done: int = 0
    scheduler_per: Literal["epoch", "step"] = "epoch"

    def advance_scheduler(self, per: Literal["epoch", "step"]) -> None:
        """Steps the scheduler, if there is one, and it is stepped once per that."""
        if self.scheduler is not None and self.scheduler_per == per:
            self.scheduler.step()

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer, as `Parts` has it."""
        return {"": self.optimizer}

    @property
    def others(self) -> list[Any]:
        """Scheduler and scaler, where there are any."""
        return [other for other in (self.scheduler, self.scaler) if other is not None]
