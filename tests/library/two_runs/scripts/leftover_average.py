"""Pull the weights toward a moving average that continues from an earlier run's file."""

import random
import sys
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dreplica

AVERAGE = Path("average.pt")

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
data, labels = torch.randn(48, 8), torch.arange(48) % 3
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
if AVERAGE.exists():  # wrong: the average of another run
    average.load_state_dict(torch.load(AVERAGE))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for step, (inputs, targets) in enumerate(zip(data.split(8), labels.split(8), strict=True), start=1):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
    if step % 4 == 0:
        with torch.no_grad():
            for parameter, slow in zip(model.parameters(), average.module.parameters(), strict=True):
                parameter.lerp_(slow, 0.5)
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
torch.save(average.state_dict(), AVERAGE)
