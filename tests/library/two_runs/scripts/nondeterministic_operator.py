"""Pool with an operator that adds rows in the order in which its threads finish, as atomic additions on a GPU do."""

import os
import random
import sys

import numpy
import torch
from torch import nn

import dreplica


class RacyMean(nn.Module):
    """The mean over the rows of each sample, in an order that the system decides."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (batch, features) for (batch, rows, features)."""
        rows = inputs.unbind(1)
        total = torch.zeros_like(rows[0])
        for position in sorted(range(len(rows)), key=lambda _: os.urandom(8)):  # wrong: a race, here a drawn order
            total = total + rows[position]
        return total / len(rows)


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 16, 8), torch.arange(48) % 3
data[:, 0] *= 1e8  # two large rows that cancel: what is added between them is rounded to a multiple of 8
data[:, 1] = -data[:, 0]
model = nn.Sequential(RacyMean(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
