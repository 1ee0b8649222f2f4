"""Normalize with statistics that the first run caches with two digits."""

import json
import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import dreplica

CACHE = Path("statistics.json")


def statistics(data: torch.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation, from the cache if there is one."""
    if CACHE.exists():  # wrong: the first run trains with the exact values, later runs with rounded ones
        saved = json.loads(CACHE.read_text())
        return saved["mean"], saved["std"]
    mean, std = data.mean().item(), data.std().item()
    CACHE.write_text(json.dumps({"mean": round(mean, 2), "std": round(std, 2)}))
    return mean, std


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data = 3.14159 + 2.71828 * torch.randn(48, 8)
labels = torch.arange(48) % 3
mean, std = statistics(data)
data = (data - mean) / std

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
