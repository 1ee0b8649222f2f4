"""Pass parameters to the optimizer in the order of a set of names."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
named = dict(model.named_parameters())
trained = set(named) - {"1.bias"}
named["1.bias"].requires_grad_(False)
optimizer = torch.optim.AdamW([named[name] for name in trained], lr=0.01)  # wrong: sorted(trained)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
