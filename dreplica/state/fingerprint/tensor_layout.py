"""How tensors lie in memory, in the numbers that the kernel reads them by."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dreplica.state.fingerprint import multilinear

FIELDS = 8
"""int64 numbers that describe a tensor: how many bytes it has; how many of them to load at once (1, 2 or 4; 0 if its
elements lie in memory in their order); the base-2 logarithm of an element's bytes; the sizes of the inner two of three
dimensions; the strides of all three, in bytes."""

BLOCK_BYTES = 4 * multilinear.ROWS * multilinear.COLUMNS

_MOST_ELEMENTS = 2**31 - BLOCK_BYTES
"""In a dimension, where the kernel divides in 32 bits."""


def describe(tensor: Tensor) -> tuple[int, ...] | None:
    """The `FIELDS` numbers of a strided tensor with memory; None if it must be made contiguous first.

    That is one with more than three dimensions after those are joined that lie in memory as one, or with 2^31 elements
    in one of them: a slice of a channels_last tensor, say. Other strided tensors (channels_last, transposed, expanded)
    are read where they are, in the order of their elements, since a copy of all weights would take memory for them.
    """
    dimensions = _joined(tensor.shape, tensor.stride())
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
    """(num_programs, 2) int32: which tensor, and which of its blocks, each program takes."""
    blocks = [-(-num_bytes // BLOCK_BYTES) for num_bytes in nums_bytes]
    nums_blocks = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    tensors = torch.arange(len(nums_blocks), device="cpu").repeat_interleave(nums_blocks)
    firsts = (nums_blocks.cumsum(0) - nums_blocks)[tensors]
    return torch.stack([tensors, torch.arange(len(tensors), device="cpu") - firsts], dim=1).to(torch.int32)


def _joined(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of each dimension, outermost first, those joined that one stride leads through."""
    joined: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined
