"""Loads exactly the samples that the coordinator sent."""

import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreplica.data.coordinator import WINDOW, IndexStream, epoch_generator

_PREFETCH = 2


@dataclass(frozen=True)
class Batch:
    """One batch, on the replica's device."""

    indices: Tensor
    """(batch,) int64, on the CPU: which samples, as the coordinator sent them."""
    inputs: Tensor
    """(batch, ...)."""
    labels: Tensor
    """(batch,) int64."""


def load_batches(
    dataset: Dataset[Any],
    stream: IndexStream,
    device: torch.device,
    num_workers: int,
    seed: int,
    epoch: int,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Generator[Batch, None, None]:
    """The stream's batches, loaded by `num_workers` processes and moved to `device`; close it to end them early.

    Workers are seeded from (seed, epoch); the training process's own generators are not drawn from.
    """
    assert num_workers * _PREFETCH < WINDOW, "workers must not read past the window that was sent"
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        pin_memory=device.type == "cuda",
        generator=epoch_generator(seed, epoch),
        worker_init_fn=_leave_the_group,
    )
    for number, (inputs, labels) in enumerate(loader):
        stream.consumed(number)
        yield Batch(
            stream.batch(number),
            inputs.to(device, non_blocking=True, memory_format=memory_format),
            labels.to(device, non_blocking=True),
        )


def load_again(
    dataset: Dataset[Any],
    indices: Tensor,
    device: torch.device,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Batch:
    """One batch of the given samples, loaded in this process, as `load_batches` would."""
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=[indices.tolist()], generator=torch.Generator())
    inputs, labels = next(iter(loader))
    return Batch(indices, inputs.to(device, memory_format=memory_format), labels.to(device))


def _leave_the_group(_worker_id: int) -> None:
    """Signals to the whole job (torchrun's SIGTERM, Ctrl-C) are the trainer's, which still needs its workers then.

    A worker ends when the loader tells it to, and notices by itself when its trainer is gone.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
