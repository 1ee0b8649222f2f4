"""A model with everything that trains it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn


class Parts(Protocol):
    """Everything that a training step reads and writes, in the trainer and in a custom training loop."""

    model: nn.Module
    criterion: nn.Module
    steps_done: int

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Name to optimizer; a single optimizer has the name ""."""

    @property
    def others(self) -> Sequence[Any]:
        """Further objects with a `state_dict`: schedulers, gradient scalers."""


@dataclass
class LoopParts:
    """The state that a custom training loop reads and writes, as `Parts`."""

    model: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]
    others: Sequence[Any]
    criterion: nn.Module = field(default_factory=nn.Module)
    steps_done: int = 0


@dataclass
class Replica:
    """One model with everything that trains it, as a `replica.factory` of the trainer returns it.

    The trainer saves, compares and replays only what is in here, so do not step the scheduler anywhere else.

    Args:
        model: The model.
        criterion: The loss, called as `criterion(outputs, labels)`.
        optimizer: The optimizer of the model's parameters.
        scheduler: The learning rate scheduler, or None.
        scaler: The GradScaler for float16. The trainer sets it.
        steps_done: Number of training steps taken.
        scheduler_per: "epoch" steps the scheduler once per epoch, "step" after each step of the optimizer (for a
            warm-up, for instance).
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    steps_done: int = 0
    scheduler_per: Literal["epoch", "step"] = "epoch"

    def advance_scheduler(self, per: Literal["epoch", "step"]) -> None:
        """Step the scheduler if there is one and `per` is its `scheduler_per`."""
        if self.scheduler is not None and self.scheduler_per == per:
            self.scheduler.step()

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer under the name "", as in `Parts`."""
        return {"": self.optimizer}

    @property
    def others(self) -> list[Any]:
        """The scheduler and the scaler that exist, as in `Parts`."""
        return [other for other in (self.scheduler, self.scaler) if other is not None]
