"""The parts of one replica."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Replica:
    """One model with what trains it: what a `replica.factory` returns.

    `criterion` is called as `criterion(outputs, labels)`; `scheduler`, if any, steps once an epoch. `scaler` is the
    fp16 GradScaler, which the trainer adds. `steps_done` counts training steps.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    steps_done: int = 0
