"""Train on a file that is edited between the runs."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
table = torch.from_numpy(numpy.loadtxt("samples.csv", delimiter=",", dtype=numpy.float32))
data, labels = table[:, :8], table[:, 8].long()
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
