"""`data.on_error: skip`: find the samples that cannot be loaded, once before the first step, for all replicas."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dreplica.data.loading.loader import isolate_worker_signals
from dreplica.data.samples import DataSets, at_epoch, load_sample
from dreplica.distributed.channel import Channel
from dreplica.errors import SharedUsageError, UsageError

log = logging.getLogger(__name__)

_PER_MESSAGE = 64
"""Number of samples whose results a worker sends at once."""
_LOG_INTERVAL = 10.0
"""Seconds between two lines of progress."""


def skip_unreadable(data: DataSets, channel: Channel, num_workers: int, location: str) -> DataSets:
    """Return the data without the samples that cannot be loaded on some node.

    Replicas with the same `location` read the same files, so they divide the samples among them and their workers. It
    takes one epoch of decoding, shared. It happens before training instead of at each step, because replicas must skip
    the same samples even if only one node's copy is bad: the number of steps, the sizes of batches and the samples that
    a replay loads are then fixed, and no step waits for an exchange. A sample that becomes unreadable later still stops
    the run.

    Note:
        Collective: call on every rank.

    Args:
        data: This replica's data.
        channel: The control channel between all replicas.
        num_workers: Number of loader processes of this replica.
        location: Host and folder from which this replica reads.

    Raises:
        SharedUsageError: If no training or no validation sample is left.
    """
    sharing = [rank for rank, other in enumerate(channel.gather(location)) if other == location]
    found = {
        part: _unreadable(dataset, sharing.index(channel.rank), len(sharing), num_workers)
        for part, dataset in (("train", data.train), ("val", data.val))
    }
    everywhere: dict[str, dict[int, str]] = {"train": {}, "val": {}}
    for of_replica in channel.gather(found):
        for part, problems in of_replica.items():
            everywhere[part] = problems | everywhere[part]
    if not everywhere["train"] and not everywhere["val"]:
        return data
    for part, dataset in (("train", data.train), ("val", data.val)):
        if len(everywhere[part]) == len(dataset):  # type: ignore[arg-type]
            raise SharedUsageError(
                f"data.on_error: 'skip' leaves no sample of the {part} set: none can be loaded. The first: "
                f"{everywhere[part][0]}",
                code="nothing-readable",
                key="data.on_error",
                part=part,
            )
    skipped = [f"{part}: {text}" for part, problems in everywhere.items() for _, text in sorted(problems.items())]
    return data.without(list(everywhere["train"]), list(everywhere["val"]), skipped)


def _unreadable(dataset: Dataset[Any], first: int, every: int, num_workers: int) -> dict[int, str]:
    """Map the index of each sample that cannot be loaded to a message, among `first`, `first + every`, ..."""
    probe = _Probe(at_epoch(dataset, 1))
    share = range(first, len(dataset), every)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        probe,
        batch_size=_PER_MESSAGE,
        sampler=share,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # a separate one, so that the global generators are not used
        worker_init_fn=isolate_worker_signals,
    )
    found: dict[int, str] = {}
    logged = time.monotonic()
    for number, pairs in enumerate(loader, start=1):
        found |= dict(pair for pair in pairs if pair is not None)
        if first == 0 and time.monotonic() - logged > _LOG_INTERVAL:
            logged = time.monotonic()
            log.info("data.on_error: checked %d of %d samples", min(number * _PER_MESSAGE, len(share)), len(share))
    return found


@dataclass(frozen=True)
class _Probe(Dataset[Any]):
    """A data set that returns index and message of samples that cannot be loaded, None for others."""

    dataset: Dataset[Any]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, str] | None:
        try:
            load_sample(self.dataset, index)
        except UsageError as error:
            return index, str(error)
        return None
