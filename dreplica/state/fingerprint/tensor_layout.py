"""The memory layout of tensors, as the numbers by which the GPU kernel reads them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dreplica.state.fingerprint import multilinear

FIELDS = 8
"""Number of int64 values that describe a tensor:

0: its size in bytes;
1: the bytes to load at once (1, 2 or 4), or 0 if its elements are in row-major order in memory;
2: the base-2 logarithm of an element's bytes;
3, 4: the sizes of the inner two of three dimensions;
5, 6, 7: the strides of all three dimensions, in bytes.
"""

BLOCK_BYTES = 4 * multilinear.ROWS * multilinear.COLUMNS

_MOST_ELEMENTS = 2**31 - BLOCK_BYTES
"""Maximum size of a dimension, since the kernel divides in 32 bits."""


def describe(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the `FIELDS` numbers of a strided tensor with memory, or None if it must be copied first.

    Dimensions that one stride leads through are merged. A tensor must be made contiguous if more than three dimensions
    remain (a slice of a channels_last tensor, for instance) or if one of them has 2^31 elements. All other strided
    tensors (channels_last, transposed, expanded) are read in place, in the order of their elements: a copy of all
    weights would need memory for all of them.
    """
    dimensions = _merged(tensor.shape, tensor.stride())
    if not tensor.numel() or not dimensions or dimensions == [(tensor.numel(), 1)]:
        return (tensor.nbytes, 0, 0, 1, 1, 0, 0, 0)
    if len(dimensions) > 3 or any(size > _MOST_ELEMENTS for size, _ in dimensions):
        return None
    (_, stride_0), (size_1, stride_1), (size_2, stride_2) = [(1, 0)] * (3 - len(dimensions)) + dimensions
    itemsize = tensor.dtype.itemsize
    unit = next(unit for unit in (4, 2, 1) if itemsize % unit == tensor.data_ptr() % unit == 0)
    strides = (stride * itemsize for stride in (stride_0, stride_1, stride_2))
    return (tensor.nbytes, unit, itemsize.bit_length() - 1, size_1, size_2, *strides)


def programs(nums_bytes: Iterable[int]) -> Tensor:
    """Return the tensor and the block of it that each program of the kernel hashes.

    Args:
        nums_bytes: The size of each tensor, in bytes.

    Returns:
        (num_programs, 2) int32 on the CPU: index of the tensor, index of the block within it.
    """
    blocks = [-(-num_bytes // BLOCK_BYTES) for num_bytes in nums_bytes]
    nums_blocks = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    tensors = torch.arange(len(nums_blocks), device="cpu").repeat_interleave(nums_blocks)
    firsts = (nums_blocks.cumsum(0) - nums_blocks)[tensors]
    return torch.stack([tensors, torch.arange(len(tensors), device="cpu") - firsts], dim=1).to(torch.int32)


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return size and stride of each dimension, outermost first, merging those that one stride leads through."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged
