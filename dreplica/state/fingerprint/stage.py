"""The stages of training state and their digests.

A stage is a list of entries (name and 16-byte digest) in causal order: the first entry that differs between replicas is
the one to report. This module does not import torch.
"""

from dataclasses import dataclass, field
from functools import cached_property

import xxhash

STAGES = ("indices", "batch", "buffers", "output", "gradients", "optimizer", "weights", "rng", "predictions")
"""All stages, in causal order within a step. When several differ, the first is reported."""

ABSENT = b"\0" * 16
"""The digest of a missing value, such as a gradient that is None."""

INDEPENDENT_STAGES = ("indices", "batch")
"""Stages that replicas with different seeds still share."""


@dataclass(frozen=True)
class Stage:
    """The digests of one stage on one replica."""

    names: tuple[str, ...]
    """The distinct names of the entries, in causal order."""
    digests: bytes
    """The digests of the entries, 16 bytes for each name, in the same order."""
    num_bytes: int = field(default=0, compare=False)
    """Number of bytes of tensors that were hashed."""

    @cached_property
    def digest(self) -> bytes:
        """The stage's digest: 16 bytes over all names and digests."""
        return xxhash.xxh3_128_digest(b"\0".join(name.encode() for name in self.names) + b"\1" + self.digests)

    def entries(self) -> dict[str, bytes]:
        """Return entry name to digest, in causal order."""
        return {name: self.digests[16 * i : 16 * i + 16] for i, name in enumerate(self.names)}
