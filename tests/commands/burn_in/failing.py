"""Models by which replica 1 goes wrong in its second pass alone, as a card that fails once; and one never sound."""

import copy
import os
import random
import signal
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.state.replica import Replica
from dreplica.training.corruption import flip_bits
from tests import fixtures


class _FailingOnce(nn.Module):
    """A module that fails at the third training step after the second build."""

    builds = 0
    steps = 0
    """Steps since the newest build. A class attribute, so that no replay restores it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)
        _FailingOnce.builds += 1
        _FailingOnce.steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.body(inputs)
        _FailingOnce.steps += self.training
        if self.training and os.environ["RANK"] == "1" and (_FailingOnce.builds, _FailingOnce.steps) == (2, 3):
            self.fail(output)
        return output

    def fail(self, output: Tensor) -> None:
        raise NotImplementedError


class FlipsOnce(_FailingOnce):
    """One bit of the output."""

    def fail(self, output: Tensor) -> None:
        flip_bits(output, 1, random.Random(0))


class DiesOnce(_FailingOnce):
    """Without a word."""

    def fail(self, output: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def unbound(config: Any, num_classes: int, device: torch.device) -> Replica:
    """Its optimizer steps a copy of the model."""
    model = fixtures.tiny_model(num_classes).to(device)
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=config.optim.lr)
    return Replica(model, nn.CrossEntropyLoss(), optimizer)
