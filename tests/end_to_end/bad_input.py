"""Functions with a defect, which jobs under test name in their configs."""

import os
from typing import Any

import torch
from torch import nn

from dreplica.config.schema import DataConfig
from dreplica.data.samples import TensorImages
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from tests import fixtures


def not_a_model(num_classes: int) -> Any:
    """Return a dict instead of a model."""
    return {"num_classes": num_classes}


class Pair(nn.Module):
    """A model that returns a tuple instead of logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and the inputs."""
        return self.body(inputs), inputs


def takes_nothing() -> nn.Module:
    """Build a model without accepting the number of classes."""
    return fixtures.tiny_model(5)


def no_replica(_config: Any, _num_classes: int, _device: torch.device) -> Any:
    """Return a model instead of a replica."""
    return nn.Linear(2, 2)


def criterion_is_a_function(config: Any, num_classes: int, _device: torch.device) -> Replica:
    """Build a replica whose criterion is a function instead of a module."""
    model = fixtures.tiny_model(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    return Replica(model, nn.functional.cross_entropy, optimizer)


def scheduled_per_batch(config: Any, num_classes: int, _device: torch.device) -> Replica:
    """Build a replica with an unknown `scheduler_per`: its scheduler would never be stepped."""
    model = fixtures.tiny_model(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler_per="batch")  # type: ignore[arg-type]


def model_with_other_threads(num_classes: int) -> nn.Module:
    """Build a model, and change a numerics flag on replica 1 that the config sets differently."""
    if os.environ.get("RANK") == "1":
        torch.set_num_threads(2)
    return fixtures.tiny_model(num_classes)


def broken_image(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Return data with one unreadable sample, which every replica reaches in the middle of the run."""
    train, val, num_classes = fixtures.tiny_images(config)
    return _Broken(train.images, train.labels), val, num_classes


class _Broken(TensorImages):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            raise UsageError("data.root: sample 7 is no image. Remove it.")
        return super().__getitem__(index)
