"""Load the weights of a pretrained model, and the state of an optimizer that an earlier run left."""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import dreplica

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
state = Path("optimizer.pt")
if state.exists():  # wrong: momentum of another run
    optimizer.load_state_dict(torch.load(state))

agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
torch.save(optimizer.state_dict(), state)
