"""A model that fails on a replica in the middle of a step, as the environment variable LOSE says."""

import os
import signal
import sys

import torch
from torch import nn

from tests import fixtures


class LosingModel(nn.Module):
    """A model that fails at the seventh training step. LOSE is `replica:way`, or `*:way` for all replicas."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        replica, way = os.environ["LOSE"].split(":")
        if self.calls == 7 and self.training and replica in {"*", os.environ["RANK"]}:
            lose(way)
        return self.body(inputs)


def lose(way: str) -> None:
    """End this process, or raise."""
    match way:
        case "raise":
            raise ArithmeticError("the sky fell")
        case "exit":
            sys.exit(0)
        case "vanish":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def build_fails(num_classes: int) -> nn.Module:
    """Fail to build the model on replica 0."""
    if os.environ["RANK"] == "0":
        raise MemoryError("out of host memory")
    return fixtures.tiny_model(num_classes)
