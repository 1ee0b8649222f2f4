"""Augment with a transform that makes its own generator, which no seed reaches."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica


class Jitter:
    """A transform that adds noise."""

    def __init__(self) -> None:
        self.generator = numpy.random.default_rng()  # wrong: seeded from the operating system

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs with noise."""
        return inputs + torch.from_numpy(self.generator.normal(0.0, 0.1, inputs.shape)).float()


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels, jitter = torch.randn(48, 8), torch.arange(48) % 3, Jitter()
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for clean, targets in zip(data.split(8), labels.split(8), strict=True):
    inputs = jitter(clean)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
