"""One message per step: are all replicas' digests equal, and does anyone want to stop, or differ from a reference?

Each replica folds its stage digests into one 128-bit word, and one all-reduce takes the maximum over the words and over
their complements. max(~w) = ~min(w), so the two results are complements of each other exactly if the largest word is
the smallest: all are equal. The message has 40 bytes whatever the number of replicas or of tensors.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from dreplica.agreement.verdict.location import Place, first_difference
from dreplica.distributed.channel import Channel, Posted
from dreplica.state.stages import Stage

MESSAGE_BYTES = 40


@dataclass(frozen=True)
class Outcome:
    """What the message of one step says, the same on every replica."""

    agreed: bool
    stop: bool
    apart: bool = False
    """Whether rank 0 has found a difference from its reference."""


def fold(step: int, stages: Mapping[str, Stage]) -> bytes:
    """16 bytes over the step and the digests of all stages."""
    return xxhash.xxh3_128_digest(
        struct.pack("<q", step) + b"".join(name.encode() + b"\0" + stage.digest for name, stage in stages.items())
    )


class Word:
    """16 bytes that stand for what a replica observed; `compute` is called when they are first needed.

    By then a device may have to be waited for.
    """

    def __init__(self, compute: Callable[[], bytes]) -> None:
        self._compute = compute

    @cached_property
    def value(self) -> bytes:
        """What `compute` returns."""
        return self._compute()


def message(word: bytes, stop: bool, apart: bool = False) -> Tensor:
    """What a replica with this `word` (16 bytes) sends: (5,) int64. The replies are its element-wise maximum."""
    low, high = struct.unpack("<qq", word)
    # In the maximum, `apart` hides another replica's `stop`, which that one sends again with the next message.
    return torch.tensor([low, high, ~low, ~high, int(stop) | 2 * apart], dtype=torch.int64, device="cpu")


def outcome(maximum: Tensor) -> Outcome:
    """What the element-wise maximum of all replicas' messages says."""
    low, high, inverted_low, inverted_high, flags = maximum.tolist()
    return Outcome(low == ~inverted_low and high == ~inverted_high, stop=bool(flags & 1), apart=bool(flags & 2))


def post(channel: Channel, word: bytes, stop: bool, apart: bool = False) -> Posted:
    """Starts the comparison of `word` (16 bytes); complete it with `read`."""
    return channel.post_max(message(word, stop, apart))


def read(channel: Channel, posted: Posted) -> Outcome:
    """Completes a comparison."""
    return outcome(channel.wait(posted))


def locate(channel: Channel, step: int, stages: Mapping[str, Stage], phase: str | None = None) -> Place:
    """Gathers every replica's step and per-tensor digests and finds where they first differ. A collective.

    `phase`: `evaluation`, where that is what this replica compared.
    """
    gathered: list[tuple[int, Mapping[str, Stage], str | None]] = channel.gather((step, dict(stages), phase))
    steps, rows, phases = zip(*gathered, strict=True)
    return first_difference(steps, rows, phases)
