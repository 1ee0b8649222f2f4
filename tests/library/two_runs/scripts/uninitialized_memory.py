"""Allocate a parameter and forget to initialize it."""

import os
import random
import sys

import numpy
import torch
from torch import nn

import dreplica


class Scaled(nn.Module):
    """A linear layer with a gain for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.empty(256))  # wrong: nn.init is missing

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (batch, 3) for (batch, 8)."""
        return self.linear(inputs * self.gain[:8].nan_to_num(1.0).clamp(-1, 1))


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
used = [torch.frombuffer(bytearray(os.urandom(1024)), dtype=torch.float32).clone() for _ in range(64)]
del used  # the memory that earlier work has left behind
data, labels, model = torch.randn(48, 8), torch.arange(48) % 3, Scaled()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
