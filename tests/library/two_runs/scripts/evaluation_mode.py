"""Evaluate a baseline in training mode, but only if no earlier run has saved its accuracy."""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import dreplica

BASELINE = Path("baseline.txt")

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(64, 8), torch.arange(64) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
if not BASELINE.exists():
    with torch.no_grad():  # wrong: no_grad does not stop BatchNorm from updating its statistics, model.eval() does
        predictions = model(data[48:]).argmax(1)
    BASELINE.write_text(f"{(predictions == labels[48:]).float().mean().item()}\n")

for inputs, targets in zip(data[:48].split(8), labels[:48].split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
