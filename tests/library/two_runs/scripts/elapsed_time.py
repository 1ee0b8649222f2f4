"""Decay the learning rate with the time since the start, to end within a budget."""

import random
import sys
import time

import numpy
import torch
from torch import nn

import dreplica

BUDGET = 60.0

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
start = time.monotonic()
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    progress = min(1.0, (time.monotonic() - start) / BUDGET)  # wrong: the clock decides
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (1 - progress)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
