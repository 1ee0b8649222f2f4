"""Load samples in threads and keep them in the order in which they arrive."""

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy
import torch
from torch import nn

import dreplica


def load(index: int) -> torch.Tensor:
    """Return one sample after the time that a busy disk takes."""
    time.sleep(os.urandom(1)[0] / 10000)
    return torch.full((8,), index / 24)


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
with ThreadPoolExecutor(4) as pool:
    pending = [pool.submit(load, index) for index in range(24)]
    data = torch.stack([done.result() for done in as_completed(pending)])  # wrong: in order of arrival
labels = torch.arange(24) % 3
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
