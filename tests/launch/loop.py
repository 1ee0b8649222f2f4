"""A training loop as in the README, which initializes a process group only if INITIALIZE is set."""

import os
import sys

import torch
import torch.distributed as dist

import dreplica

if "INITIALIZE" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
inputs, labels = torch.randn(32, 8), torch.arange(32) % 2
model = torch.nn.Linear(8, 2)
optimizer = torch.optim.Adam(model.parameters())
agreement = dreplica.Agreement(model, optimizer, record=sys.argv[1] if len(sys.argv) > 1 else None)
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    agreement.step(batch=(inputs, labels), loss=loss)
agreement.finish()
agreement.close()
if "INITIALIZE" in os.environ:
    dist.destroy_process_group()
