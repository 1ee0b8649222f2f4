"""Train with workers, dropout, a split, weight-decay groups and a checkpoint, and reproduce every bit."""

import random
import sys

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

import dreplica


class Noisy(Dataset):
    """Samples with noise from the worker's own generators, which DataLoader seeds."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.from_numpy(numpy.random.standard_normal(8)).float()
        return torch.full((8,), float(index % 4)) + 0.1 * noise + 0.1 * torch.randn(8), index % 4


random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
train, _ = random_split(Noisy(), [32, 8], generator=torch.Generator().manual_seed(1))
loader = DataLoader(train, batch_size=8, shuffle=True, num_workers=1)

model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
named = dict(model.named_parameters())
decay = {name for name in named if name.endswith("weight")}
groups = [
    {"params": [named[name] for name in sorted(decay)], "weight_decay": 0.1},
    {"params": [named[name] for name in sorted(named.keys() - decay)], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
agreement = dreplica.Agreement(model, optimizer, others=[scheduler], record=sys.argv[1])
for epoch in (1, 2):
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        agreement.step(batch=(inputs, labels), loss=loss, epoch=epoch)
    scheduler.step()
agreement.finish()
torch.save(model.state_dict(), f"{sys.argv[1]}.pt")
