"""Many Agreements in one process, one after the other: nothing is left of them."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

import dreplica
from tests.harness import run_scripts

pytestmark = pytest.mark.process


def resources() -> tuple[int, list[str]]:
    """Return the number of open files and the names of the threads of this process."""
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


def make_many(rank: int, num_ranks: int, number: int, folder: Path) -> list[bool]:
    """Make and close Agreements, of which every second one ends its training."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=num_ranks)
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    before = resources()
    for i in range(number):
        with dreplica.Agreement(model, stages=("weights",)) as agreement:
            agreement.step()
            if i % 2:
                agreement.finish()
    end = time.monotonic() + 5
    while resources() != before and time.monotonic() < end:
        time.sleep(0.05)
    return [resources() == before, agreement.steps_checked == 1]


def test_thousand_agreements_leave_nothing_behind(tmp_path: Path) -> None:
    assert run_scripts(make_many, 1, 1, 1000, tmp_path) == [[True, True]]


def test_agreements_of_two_ranks_leave_nothing_behind(tmp_path: Path) -> None:
    """More than there may be open files, so that not even one may be left of each."""
    assert run_scripts(make_many, 2, 2, 260, tmp_path) == [[True, True]] * 2
