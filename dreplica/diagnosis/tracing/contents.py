"""Contents of the tensors that an operator reads and writes, as records keep them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dreplica.state.fingerprint.fingerprint import digest_tensor
from dreplica.state.fingerprint.stage import ABSENT


def digests_of(tensors: Iterable[Tensor]) -> bytes:
    """Return the digests of tensors, 16 bytes each."""
    return b"".join(map(digest_of, tensors))


def digest_of(tensor: Tensor) -> bytes:
    """Return a digest, `ABSENT` for tensors without plain memory: meta, quantized and nested ones."""
    layouts = (torch.strided, torch.sparse_coo)
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout not in layouts:
        return ABSENT
    return digest_tensor("", tensor)


def shapes_of(tensors: Iterable[Tensor]) -> bytes:
    """Return the dtypes and shapes of tensors."""
    # A view computes nothing, and it may be a view of uninitialized memory.
    return repr([None if t.is_nested else (t.dtype, tuple(t.shape)) for t in tensors]).encode()
