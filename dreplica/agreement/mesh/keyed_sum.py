"""One message per step for a mesh: do all ranks that should hold the same bytes have the same digests?

The ranks that hold copies of a tensor form a ring. Between a rank and the one before it lies an edge, and every
edge has a separate function from digests to 128 bits: XXH3 over the copies' label, the number of the edge, and the
digest. A rank adds the value of its digest at the edge before it, and subtracts that at the edge behind it, as four
numbers of 32 bits. The sum over all ranks is taken by one all-reduce of 40 bytes, for any number of ranks, tensors and
axes.

Where two neighbours have the same digest, the two terms of their edge cancel. So if all copies agree, the sum is 0
modulo 2^32 in each of the four numbers. If some do not agree, some edge's terms do not cancel, and the sum holds the
difference of two values of XXH3 for two inputs. Taken as a random function, these make each of the four numbers 0 with
probability 2^-32, independently: a difference goes unnoticed with probability 2^-128, which is that of two equal
digests of different tensors. A rank without a second copy has one edge to itself and adds 0.
"""

import struct
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor

from dreplica.agreement.mesh.axes import Copies
from dreplica.agreement.protocol import Outcome

_LIMBS = struct.Struct("<4I")
_DIFFERS = 1 << 32
"""Added for a difference from the reference; `stop` adds 1. Fewer than 2^31 ranks add either."""


def message(digests: Iterable[tuple[Copies, bytes]], stop: bool, differs_from_reference: bool = False) -> Tensor:
    """Return the message that a rank sends.

    Args:
        digests: The digest of each class of tensors, 16 bytes, with the ranks that hold copies of them.
        stop: True if this rank wants to stop.
        differs_from_reference: True if this rank has found a difference from its reference.

    Returns:
        (5,) int64 on the CPU. The ranks' results are in its element-wise sum.
    """
    limbs = [0, 0, 0, 0]
    for copies, digest in digests:
        count = len(copies.ranks)
        if count > 1:
            before, behind = (_at_edge(copies, edge % count, digest) for edge in (copies.index, copies.index + 1))
            limbs = [limb + one - other for limb, one, other in zip(limbs, before, behind, strict=True)]
    flags = int(stop) + _DIFFERS * differs_from_reference
    return torch.tensor([*(limb % 2**32 for limb in limbs), flags], dtype=torch.int64, device="cpu")


def outcome(total: Tensor) -> Outcome:
    """Return the result of a step from the sum of all ranks' messages."""
    *limbs, flags = total.tolist()
    differs, stop = divmod(flags, _DIFFERS)
    return Outcome(agreed=not any(limb % 2**32 for limb in limbs), stop=stop > 0, differs_from_reference=differs > 0)


def _at_edge(copies: Copies, edge: int, digest: bytes) -> tuple[int, ...]:
    key = repr((copies.label, edge)).encode()
    return _LIMBS.unpack(xxhash.xxh3_128_digest(key + b"\0" + digest))
