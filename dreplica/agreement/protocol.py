"""One message per step: are all replicas' digests equal, and does anyone want to stop?

Each replica folds its stage digests into one 128-bit word, and one all-reduce takes the maximum over the words and over
their complements. max(~w) = ~min(w), so the two results are complements of each other exactly if the largest word is
the smallest: all are equal. The message has 40 bytes whatever the number of replicas or of tensors.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from dreplica.agreement.stages import STAGES, Stage
from dreplica.agreement.verdict import split_into_classes
from dreplica.world.channel import Channel, Posted

MESSAGE_BYTES = 40


@dataclass(frozen=True)
class Outcome:
    """What the message of one step says, the same on every replica."""

    agreed: bool
    stop: bool


@dataclass(frozen=True)
class Place:
    """The first stage and entry in which replicas differ, and the classes they fall into there."""

    stage: str
    tensor: str | None
    """The first differing entry in causal order; None if replicas do not even have the same entries."""
    classes: list[list[int]]
    num_differing: int
    """How many of the stage's entries differ."""
    num_entries: int
    differing_stages: list[str]
    only_on: dict[str, list[int]]
    """Entries that only some replicas have, and which."""


def fold(step: int, stages: Mapping[str, Stage]) -> bytes:
    """16 bytes over the step and the digests of all stages."""
    return xxhash.xxh3_128_digest(
        struct.pack("<q", step) + b"".join(name.encode() + b"\0" + stage.digest for name, stage in stages.items())
    )


def post(channel: Channel, word: bytes, stop: bool) -> Posted:
    """Starts the comparison of `word` (16 bytes); complete it with `read`."""
    low, high = struct.unpack("<qq", word)
    return channel.post_max(torch.tensor([low, high, ~low, ~high, int(stop)], dtype=torch.int64))


def read(channel: Channel, posted: Posted) -> Outcome:
    """Completes a comparison."""
    low, high, inverted_low, inverted_high, stop = _values(channel.wait(posted))
    return Outcome(agreed=low == ~inverted_low and high == ~inverted_high, stop=bool(stop))


def locate(channel: Channel, stages: Mapping[str, Stage]) -> Place:
    """Gathers every replica's per-tensor digests and finds where they first differ. A collective."""
    gathered: list[Mapping[str, Stage]] = channel.gather(dict(stages))
    differing = [name for name in STAGES if len({row[name].digest for row in gathered if name in row}) > 1]
    assert differing, "the words differ, so some stage does"
    stage = differing[0]
    rows = [row[stage].entries() for row in gathered]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    unequal = [name for name in shared if len({row[name] for row in rows}) > 1]
    everything = {name: None for row in rows for name in row}
    return Place(
        stage=stage,
        tensor=unequal[0] if unequal else None,
        classes=split_into_classes([row[stage].digest for row in gathered]),
        num_differing=len(unequal),
        num_entries=len(rows[0]),
        differing_stages=differing,
        only_on={
            name: [replica for replica, row in enumerate(rows) if name in row]
            for name in everything
            if name not in shared
        },
    )


def _values(tensor: Tensor) -> tuple[int, int, int, int, int]:
    low, high, inverted_low, inverted_high, stop = tensor.tolist()
    return low, high, inverted_low, inverted_high, stop
