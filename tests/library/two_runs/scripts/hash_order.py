"""Number classes in the order of a set of strings, which depends on the hash seed of the process."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

FILES = [f"{animal}_{number}.png" for number in range(8) for animal in ("cat", "cow", "dog", "fox", "hen", "pig")]

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
names = {file.partition("_")[0] for file in FILES}
number_of = {name: number for number, name in enumerate(names)}  # wrong: another order in each process
data = torch.randn(48, 8)
labels = torch.tensor([number_of[file.partition("_")[0]] for file in FILES])

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
