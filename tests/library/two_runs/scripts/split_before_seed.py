"""Draw the split from the default generator before it is seeded."""

import random
import sys

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import dreplica

data = torch.arange(640, dtype=torch.float32).view(80, 8) / 640
dataset = TensorDataset(data, torch.arange(80) % 3)
train, _ = random_split(dataset, [64, 16])  # wrong: the seed comes two lines later

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
loader = DataLoader(train, batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in loader:
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
