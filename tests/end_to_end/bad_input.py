"""Functions that jobs under test name in their configs, and that fail in some way."""

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
    """A factory that returns the wrong type."""
    return {"num_classes": num_classes}


class Pair(nn.Module):
    """Gives more than logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the inputs once more."""
        return self.body(inputs), inputs


def takes_nothing() -> nn.Module:
    """A factory that cannot be told the number of classes."""
    return fixtures.tiny_model(5)


def no_replica(_config: Any, _num_classes: int, _device: torch.device) -> Any:
    """A replica factory that returns the wrong type."""
    return nn.Linear(2, 2)


def criterion_is_a_function(config: Any, num_classes: int, _device: torch.device) -> Replica:
    """A replica factory whose parts will not do."""
    model = fixtures.tiny_model(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    return Replica(model, nn.functional.cross_entropy, optimizer)


def scheduled_per_batch(config: Any, num_classes: int, _device: torch.device) -> Replica:
    """A word for when its scheduler steps that does not exist: it would never step."""
    model = fixtures.tiny_model(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler_per="batch")  # type: ignore[arg-type]


def unusable_on_replica_1(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Data whose file is missing on one node."""
    if os.environ.get("RANK") == "1":
        raise UsageError("data.root: there is no folder '/data'. Mount it.")
    return fixtures.tiny_images(config)


def model_with_other_threads(num_classes: int) -> nn.Module:
    """A factory that changes a numerics flag on one replica, behind the config's back."""
    if os.environ.get("RANK") == "1":
        torch.set_num_threads(2)
    return fixtures.tiny_model(num_classes)


def broken_image(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Data with a sample that cannot be read: every replica meets it in the middle of the run."""
    train, val, num_classes = fixtures.tiny_images(config)
    return _Broken(train.images, train.labels), val, num_classes


class _Broken(TensorImages):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            raise UsageError("data.root: sample 7 is no image. Remove it.")
        return super().__getitem__(index)
