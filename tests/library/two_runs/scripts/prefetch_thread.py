"""Prefetch batches in a thread that draws noise from the generator that dropout draws from, too."""

import os
import queue
import random
import sys
import threading
import time

import numpy
import torch
from torch import nn

import dreplica

STEPS = 20


def prefetch(batches: queue.Queue) -> None:
    """Read batches from a slow disk and add noise."""
    for number in range(STEPS):
        time.sleep(os.urandom(1)[0] / 5000)  # up to 51 ms, as a busy disk takes
        noise = torch.randn(8, 8)  # wrong: the main thread draws from this generator at the same time
        batches.put((number / STEPS + 0.1 * noise, torch.arange(8) % 3))


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
batches: queue.Queue = queue.Queue(maxsize=2)
threading.Thread(target=prefetch, args=(batches,), daemon=True).start()
for _ in range(STEPS):
    inputs, targets = batches.get()
    time.sleep(0.02)  # the rest of a step
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
