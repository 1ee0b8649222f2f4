"""What makes up training state, stage by stage, and each part's digest; nothing here needs torch.

A stage is a list of entries (name, 16-byte digest) in causal order: the first entry that differs between replicas is
the one to report.
"""

from dataclasses import dataclass, field
from functools import cached_property

import xxhash

STAGES = ("indices", "batch", "buffers", "output", "gradients", "optimizer", "weights", "rng", "predictions")
"""In the causal order within a step: of several that differ, the first is the one to report."""

INDEPENDENT_STAGES = ("indices", "batch")
"""What replicas from distinct seeds still share."""


@dataclass(frozen=True)
class Stage:
    """The digests of one stage on one replica."""

    names: tuple[str, ...]
    """Distinct."""
    digests: bytes
    """16 bytes for each name, in order."""
    num_bytes: int = field(default=0, compare=False)
    """How many bytes of tensors were hashed."""

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over all names and digests."""
        return xxhash.xxh3_128_digest(b"\0".join(name.encode() for name in self.names) + b"\1" + self.digests)

    def entries(self) -> dict[str, bytes]:
        """Name to digest, in causal order."""
        return {name: self.digests[16 * i : 16 * i + 16] for i, name in enumerate(self.names)}
