"""Models that jobs under test name in their configs, and that are interrupted."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dreplica.training.checkpoint.async_writer
from tests import fixtures


class Killed(nn.Module):
    """Killed in mid-step where the environment says so, as `KILL=replica:step:mark ...`: once for each mark."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)
        self.calls = 0
        """Kept in checkpoints, as any number of a module's is."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        self.calls += self.training
        for replica, step, mark in (order.split(":") for order in os.environ.get("KILL", "").split()):
            if self.training and (os.environ["RANK"], self.calls) == (replica, int(step)) and not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.body(inputs)


def other_threads(num_classes: int) -> nn.Module:
    """Changes a flag on replica 1 where the environment says so (`OTHER_THREADS`), as another node might have it."""
    if os.environ["RANK"] == "1" and "OTHER_THREADS" in os.environ:
        torch.set_num_threads(torch.get_num_threads() + 1)
    return fixtures.tiny_model(num_classes)


def full_once(num_classes: int) -> nn.Module:
    """The disk is full when the first checkpoint is written."""
    write = dreplica.training.checkpoint.async_writer.write_checkpoint

    def write_to_full_disk(*_arguments: object) -> None:
        dreplica.training.checkpoint.async_writer.write_checkpoint = write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dreplica.training.checkpoint.async_writer.write_checkpoint = write_to_full_disk
    return fixtures.tiny_model(num_classes)


def full_on_replica_1(num_classes: int) -> nn.Module:
    """Replica 1's disk is full from its second checkpoint on."""
    write = dreplica.training.checkpoint.async_writer.write_checkpoint
    written = 0

    def write_once(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if os.environ["RANK"] == "1" and written > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    dreplica.training.checkpoint.async_writer.write_checkpoint = write_once
    return fixtures.tiny_model(num_classes)


class ToldToStop(nn.Module):
    """Replica 1 gets the signal STOP_SIGNAL in its third step."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)
        self._calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        self._calls += self.training
        if self.training and self._calls == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.Signals[os.environ["STOP_SIGNAL"]])
        return self.body(inputs)
