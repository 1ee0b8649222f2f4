"""Print a random sample for a look at the data, unless an earlier run did."""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn

import dreplica

PREVIEW = Path("preview.txt")

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for step, (inputs, targets) in enumerate(zip(data.split(8), labels.split(8), strict=True), start=1):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 3 and not PREVIEW.exists():
        PREVIEW.write_text(f"{inputs[torch.randint(8, ())].tolist()}\n")  # wrong: moves the training's generator
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
