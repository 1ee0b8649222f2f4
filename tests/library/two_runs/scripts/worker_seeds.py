"""Seed loader workers by the time, so that augmentation differs in each run."""

import random
import sys
import time

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dreplica


class Noisy(Dataset):
    """Samples with noise from NumPy's global generator."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.from_numpy(numpy.random.standard_normal(8)).float()
        return torch.full((8,), float(index % 4)) + 0.1 * noise, index % 4


def seed_worker(worker_id: int) -> None:
    """Seed NumPy in a worker."""
    numpy.random.seed((time.time_ns() + worker_id) % 2**32)  # wrong: DataLoader had seeded it already


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=1, worker_init_fn=seed_worker)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in loader:
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
