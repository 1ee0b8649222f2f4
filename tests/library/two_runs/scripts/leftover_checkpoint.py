"""Resume from any checkpoint that is there, which is the first run's."""

import os
import random
import sys

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
if os.path.exists("last.pt"):  # wrong: nothing says that this run should resume
    saved = torch.load("last.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])

agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
