"""The Python examples on the pages of causes run, and their assertions hold.

Names that an example uses without defining them are defined here, anew for each page.
"""

import copy
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import dreplica
from tests.harness import REPOSITORY

_EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PAGES = {
    path.stem: _EXAMPLE.findall(path.read_text()) for path in sorted((REPOSITORY / "docs" / "causes").glob("*.md"))
}


@pytest.fixture
def names(tmp_path: Path) -> Any:
    """Names that the examples use. Flags and generators are restored afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    yield {
        "copy": copy,
        "dreplica": dreplica,
        "nn": nn,
        "numpy": numpy,
        "os": os,
        "time": time,
        "torch": torch,
        "DataLoader": DataLoader,
        "DistributedSampler": DistributedSampler,
        "model": model,
        "optimizer": optimizer,
        "state": copy.deepcopy(model.state_dict()),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=10),
        "inputs": torch.randn(8, 3, 8, 8),
        "labels": torch.arange(8) % 5,
        "dataset": list(range(8)),
        "indices": torch.tensor([0, 1, 1, 3]),
        "values": torch.ones(4),
        "seed": 42,
        "epoch": 1,
        "marker": str(tmp_path / "marker"),
    }
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.process
@pytest.mark.parametrize("cause", [cause for cause, examples in _PAGES.items() if examples])
def test_examples_run(cause: str, names: dict[str, Any]) -> None:
    for example in _PAGES[cause]:
        exec(compile(example, f"docs/causes/{cause}.md", "exec"), names)


def test_most_pages_have_an_example() -> None:
    without = {cause for cause, examples in _PAGES.items() if not examples}
    assert without == {"config-differs", "declared-override", "persistent-fault"}  # commands, and hardware
