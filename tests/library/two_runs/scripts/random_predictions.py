"""Average predictions over random shifts at evaluation, drawn from an unseeded generator."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(64, 8), torch.arange(64) % 3
shifts = numpy.random.default_rng()  # wrong: seeded from the operating system
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for epoch in (1, 2):
    for inputs, targets in zip(data[:48].split(8), labels[:48].split(8), strict=True):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agreement.step(batch=(inputs, targets), loss=loss, epoch=epoch)
    with torch.no_grad():
        logits = sum(model(data[48:] + float(shifts.normal())) for _ in range(4))
    agreement.evaluation({"logits": logits}, epoch)
agreement.finish()
