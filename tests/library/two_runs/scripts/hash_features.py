"""Turn words into token ids with hash(), which depends on the hash seed of the process."""

import random
import sys

import numpy
import torch
from torch import nn

import dreplica

TEXTS = [[f"word{(7 * row + 3 * column) % 29}" for column in range(6)] for row in range(48)]

random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
tokens = torch.tensor([[hash(word) % 1000 for word in text] for text in TEXTS])  # wrong
labels = torch.arange(48) % 3

model = nn.Sequential(nn.EmbeddingBag(1000, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1])
for inputs, targets in zip(tokens.split(8), labels.split(8), strict=True):
    loss = nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, targets), loss=loss)
agreement.finish()
