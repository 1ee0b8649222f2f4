"""`data.on_error: skip`: which samples cannot be loaded, found out once, before the first step, for all replicas."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dreplica.data.loading.loader import leave_the_group
from dreplica.data.samples import DataSets, at_epoch, load_sample
from dreplica.distributed.channel import Channel
from dreplica.errors import SharedUsageError, UsageError

log = logging.getLogger(__name__)

_PER_MESSAGE = 64
"""Samples whose results a worker sends at once."""
_SECONDS_BETWEEN_LINES = 10.0


def leave_out_unreadable(data: DataSets, channel: Channel, num_workers: int, place: str) -> DataSets:
    """The data without the samples that cannot be loaded on some node. A collective.

    Replicas with the same `place` (host and folder) read the same files: they divide the samples among them, and their
    workers. So it takes an epoch of decoding, shared. It is done before training rather than step by step, since
    replicas must leave out the same samples even where only one node's copy is bad: the number of steps, the sizes of
    batches and the samples that a replay loads are then settled, and no step waits for an exchange. A sample that turns
    bad later still stops the run. Raises SharedUsageError if nothing is left.
    """
    alike = [rank for rank, other in enumerate(channel.gather(place)) if other == place]
    found = {
        part: _unreadable(dataset, alike.index(channel.rank), len(alike), num_workers)
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
                f"data.on_error: skip leaves nothing of the {part} set: none of its samples can be loaded. The first: "
                f"{everywhere[part][0]}"
            )
    skipped = [f"{part}: {text}" for part, problems in everywhere.items() for _, text in sorted(problems.items())]
    return data.without(list(everywhere["train"]), list(everywhere["val"]), skipped)


def _unreadable(dataset: Dataset[Any], first: int, every: int, num_workers: int) -> dict[int, str]:
    """Index to message, of what cannot be loaded among the samples `first`, `first + every`, ..."""
    probe = _Probe(at_epoch(dataset, 1))
    share = range(first, len(dataset), every)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        probe,
        batch_size=_PER_MESSAGE,
        sampler=share,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # of its own: the global ones are not drawn from
        worker_init_fn=leave_the_group,
    )
    found: dict[int, str] = {}
    told = time.monotonic()
    for number, pairs in enumerate(loader, start=1):
        found |= dict(pair for pair in pairs if pair is not None)
        if first == 0 and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            log.info("data.on_error: looked at %d of %d samples", min(number * _PER_MESSAGE, len(share)), len(share))
    return found


@dataclass(frozen=True)
class _Probe(Dataset[Any]):
    dataset: Dataset[Any]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, str] | None:
        try:
            load_sample(self.dataset, index)
        except UsageError as error:
            return index, str(error)
        return None
