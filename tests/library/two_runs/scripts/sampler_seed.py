"""Shuffle with a generator that is seeded by the time."""

import random
import sys
import time

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
shuffler = torch.Generator().manual_seed(time.time_ns() % 2**31)  # wrong
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for indices in torch.randperm(48, generator=shuffler).split(8):
    inputs, targets = data[indices], labels[indices]
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(indices=indices, batch=(inputs, targets), loss=loss)
agreement.finish()
