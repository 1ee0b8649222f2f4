"""Contracts of the functions that a config names for the model or the whole replica.

Each is named as `package.module:function` and must be importable by every replica: put its folder on PYTHONPATH.
"""

from typing import Protocol

import torch
from torch import nn

from dreplica.config.schema import RunConfig
from dreplica.state.replica import Replica


class ModelFactory(Protocol):
    """The function that `model.factory` names. It is used instead of `model.name`.

    It runs once per replica under the replica's seed (`seed.model`), so every draw from the global generators of
    Python, NumPy and torch reproduces. Do not seed inside it. Draw on the CPU, so that the weights do not depend on the
    device: the trainer moves the model afterwards. Run a dummy batch through lazy modules before returning.

    With `model.weights`, the trainer loads that file into the returned model, except into its head: the last linear or
    convolutional layer with `num_classes` outputs.
    """

    def __call__(self, *, num_classes: int) -> nn.Module:
        """Build the model.

        Args:
            num_classes: Number of outputs: `model.num_classes`, by default the number of classes of the data set.

        Returns:
            The model on the CPU. Its forward pass takes inputs (batch, ...) and returns logits (batch, num_classes).
        """


class ReplicaFactory(Protocol):
    """The function that `replica.factory` names.

    It replaces the sections `model`, `criterion`, `optim` and `schedule`, which it may read from `config`. It runs once
    per replica under the replica's seed (`seed.model`). Build everything from scratch, do not seed inside it, and move
    the model to `device` before creating the optimizer.
    """

    def __call__(self, config: RunConfig, num_classes: int, device: torch.device) -> Replica:
        """Build the replica.

        Args:
            config: The whole config of this replica, its overrides merged in.
            num_classes: Number of outputs: `model.num_classes`, by default the number of classes of the data set.
            device: The replica's device.

        Returns:
            `dreplica.Replica(model=, criterion=, optimizer=, scheduler=)`. The criterion is an `nn.Module` that is
            called as `criterion(outputs, labels)`. The scheduler is None or one of `torch.optim.lr_scheduler` except
            ReduceLROnPlateau, which waits for a metric. It is stepped once per epoch, or once per training step with
            `scheduler_per="step"`.
        """
