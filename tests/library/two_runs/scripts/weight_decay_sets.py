"""Make one parameter group per kind of parameter, in the order of a set of kinds."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

DECAY = {"matrix": 0.1, "bias": 0.0, "gain": 0.01, "shift": 0.001}

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def kind_of(name: str) -> str:
    """Return the kind of a parameter."""
    layer, kind = name.split(".")
    if layer == "1":
        return "gain" if kind == "weight" else "shift"
    return "matrix" if kind == "weight" else "bias"


kinds = {kind_of(name) for name, _ in model.named_parameters()}
groups = [
    {
        "params": [parameter for name, parameter in model.named_parameters() if kind_of(name) == kind],
        "weight_decay": DECAY[kind],
    }
    for kind in kinds  # wrong: a set has another order in each process
]
optimizer = torch.optim.AdamW(groups, lr=0.01)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(data.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
