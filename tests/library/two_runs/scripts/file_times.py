"""Read the files of a folder in the order of their times, which a copy or an edit changes."""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
files = sorted(Path("samples").glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)  # wrong
data = torch.stack([torch.from_numpy(numpy.loadtxt(path, dtype=numpy.float32)) for path in files])
labels = torch.arange(len(files)) % 3
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
