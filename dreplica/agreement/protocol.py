"""One message per step: are all replicas' digests equal, and does a replica want to stop or differ from a reference?

Each replica folds its stage digests into one combined digest of 128 bits. One all-reduce takes the maximum over these
digests and over their complements. max(~d) = ~min(d), so the two results are complements of each other exactly if the
largest digest equals the smallest, that is, if all are equal. The message has 40 bytes for any number of replicas and
tensors.
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
    """Result of the message of one step, the same on every replica."""

    agreed: bool
    stop: bool
    differs_from_reference: bool = False
    """True if rank 0 has found a difference from its reference."""


def fold(step: int, stages: Mapping[str, Stage]) -> bytes:
    """Return 16 bytes over the step and the digests of all stages."""
    return xxhash.xxh3_128_digest(
        struct.pack("<q", step) + b"".join(name.encode() + b"\0" + stage.digest for name, stage in stages.items())
    )


class CombinedDigest:
    """16 bytes over all that a replica compares at a step, computed when first read.

    Reading it may wait for the device that computes the digests.

    Args:
        compute: Computes the 16 bytes.
    """

    def __init__(self, compute: Callable[[], bytes]) -> None:
        self._compute = compute

    @cached_property
    def value(self) -> bytes:
        """The 16 bytes."""
        return self._compute()


def message(combined: bytes, stop: bool, differs_from_reference: bool = False) -> Tensor:
    """Return the message that a replica sends.

    Args:
        combined: The combined digest, 16 bytes.
        stop: True if this replica wants to stop.
        differs_from_reference: True if rank 0 has found a difference from its reference.

    Returns:
        (5,) int64 on the CPU. The replicas' results are in its element-wise maximum.
    """
    low, high = struct.unpack("<qq", combined)
    # The flags share one number. In the maximum `differs_from_reference` hides another replica's `stop`, which that
    # replica sends again with its next message.
    flags = int(stop) | 2 * differs_from_reference
    return torch.tensor([low, high, ~low, ~high, flags], dtype=torch.int64, device="cpu")


def outcome(maximum: Tensor) -> Outcome:
    """Return the result of a step from the element-wise maximum of all replicas' messages."""
    low, high, inverted_low, inverted_high, flags = maximum.tolist()
    agreed = low == ~inverted_low and high == ~inverted_high
    return Outcome(agreed, stop=bool(flags & 1), differs_from_reference=bool(flags & 2))


def post(channel: Channel, combined: bytes, stop: bool, differs_from_reference: bool = False) -> Posted:
    """Start a comparison, to be completed with `read`.

    Args:
        channel: The control channel between all replicas.
        combined: The combined digest, 16 bytes.
        stop: True if this replica wants to stop.
        differs_from_reference: True if rank 0 has found a difference from its reference.

    Returns:
        The collective in progress.
    """
    return channel.post_max(message(combined, stop, differs_from_reference))


def read(channel: Channel, posted: Posted) -> Outcome:
    """Complete a comparison."""
    return outcome(channel.wait(posted))


def locate(channel: Channel, step: int, stages: Mapping[str, Stage], phase: str | None = None) -> Place:
    """Gather every replica's step and digests, and return where they first differ.

    Note:
        Collective: call it on every rank.

    Args:
        channel: The control channel between all replicas.
        step: The step that this replica compared.
        stages: The digests that this replica compared.
        phase: "evaluation" if this replica compared an evaluation, otherwise None.

    Returns:
        The step, stage and tensor, with the groups of replicas.
    """
    gathered: list[tuple[int, Mapping[str, Stage], str | None]] = channel.gather((step, dict(stages), phase))
    steps, rows, phases = zip(*gathered, strict=True)
    return first_difference(steps, rows, phases)
