"""Recovery of a changed word from two digests of `multilinear`, where one of the two tensors is gone.

If only one 32-bit word of a tensor changes, only one column's sum changes. Its term in the content is the old term plus
the difference of the digests, and mix64 is a bijection, so the new sum is known for each column that may have changed.
The difference of the sums is a row key times the difference of the words, and row keys are odd, so it can be divided by
each of them. A result that is the difference of two 32-bit words in both lanes, and of the same words, is the change: a
wrong word meets this with a probability below 2^-90 for each word of the tensor.
"""

from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreplica.state.fingerprint.multilinear import COLUMNS, MIX_1, MIX_2, ROWS, column_keys, mix64, row_keys

_BLOCKS_AT_ONCE = 32
"""Blocks of 64 KiB that are searched at once, to bound the memory."""
_BYTES = 4 * ROWS * COLUMNS
_Words = NDArray[numpy.uint64]


@dataclass(frozen=True)
class ChangedWord:
    """The word in which two tensors differ."""

    index: int
    """Position of the word, in units of four bytes."""
    value: int
    """The word in the tensor that is gone, as a little-endian unsigned integer."""


def recover_tensor(tensor: Tensor, digest: bytes, other: bytes) -> Tensor | None:
    """Recover a tensor that differs in one 32-bit word from one that is still there.

    Args:
        tensor: The tensor that is there, strided.
        digest: Its digest, 16 bytes.
        other: Digest of the tensor that is gone, with the same name, dtype and shape.

    Returns:
        The tensor that is gone, on the device of the other. None if more than one word differs, or if the digests are
        not those of `multilinear`.
    """
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    own = tensor.detach().cpu().contiguous()
    data = own.reshape(-1).view(torch.uint8).numpy()
    word = find_changed_word(data, digest, other)
    if word is None:
        return None
    changed = torch.from_numpy(changed_bytes(data, word)).view(own.dtype).reshape(own.shape)
    return changed.to(tensor.device)


def find_changed_word(data: NDArray[numpy.uint8], digest: bytes, other: bytes) -> ChangedWord | None:
    """Find the one word whose change turns a tensor of one digest into a tensor of another.

    Args:
        data: Bytes of the tensor that is there, in row-major order.
        digest: Its digest, 16 bytes.
        other: Digest of the tensor that is gone, with the same name, dtype and shape.

    Returns:
        The word. None if more than one word differs, or if the digests are not those of `multilinear`.
    """
    lanes = numpy.frombuffer(other, "<u8") - numpy.frombuffer(digest, "<u8")
    for start in range(0, data.size, _BYTES * _BLOCKS_AT_ONCE):
        found = _search(data[start : start + _BYTES * _BLOCKS_AT_ONCE], start // _BYTES, lanes)
        if found is not None:
            index = start // 4 + found.index
            return ChangedWord(index, found.value) if _fits(data.size, index, found.value) else None
    return None


def changed_bytes(data: NDArray[numpy.uint8], word: ChangedWord) -> NDArray[numpy.uint8]:
    """Return a copy of a tensor's bytes with the changed word."""
    changed = data.copy()
    own = numpy.frombuffer(word.value.to_bytes(4, "little"), numpy.uint8)
    at = 4 * word.index
    changed[at : at + 4] = own[: data.size - at]
    return changed


def _search(data: NDArray[numpy.uint8], first_block: int, lanes: NDArray[numpy.uint64]) -> ChangedWord | None:
    num_blocks = -(-data.size // _BYTES)
    padded = numpy.zeros(num_blocks * _BYTES, numpy.uint8)
    padded[: data.size] = data
    words = padded.view("<u4").reshape(num_blocks, ROWS, COLUMNS)
    turned = _turn(words)
    first = first_block * COLUMNS
    positions = numpy.arange(first, first + num_blocks * COLUMNS, dtype=numpy.uint64).reshape(num_blocks, COLUMNS)
    changed = []
    for lane, own in enumerate((words, turned)):
        keys = row_keys(lane)
        sums = numpy.zeros((num_blocks, COLUMNS), numpy.uint64)
        for row, key in enumerate(keys):
            sums += own[:, row].astype(numpy.uint64) * key
        shifts = column_keys(lane, positions)
        difference = _unmix64(mix64(sums + shifts) + lanes[lane]) - shifts - sums
        inverses = numpy.array([pow(int(key), -1, 2**64) for key in keys], numpy.uint64)
        changed.append(own.astype(numpy.uint64) + difference[:, None, :] * inverses[None, :, None])
    fits = (changed[0] < 2**32) & (changed[1] < 2**32)
    for block, row, column in zip(*numpy.nonzero(fits), strict=True):
        value, other = int(changed[0][block, row, column]), int(changed[1][block, row, column])
        if other == (value >> 16 | (value & 0xFFFF) << 16) and value != int(words[block, row, column]):
            return ChangedWord((int(block) * ROWS + int(row)) * COLUMNS + int(column), value)
    return None


def _fits(size: int, index: int, value: int) -> bool:
    """Return True if the word is in a tensor of `size` bytes, and its padding is zero."""
    rest = size - 4 * index
    return rest >= 4 or (rest > 0 and value < 2 ** (8 * rest))


def _turn(words: NDArray[numpy.uint32]) -> NDArray[numpy.uint32]:
    return (words << numpy.uint32(16)) | (words >> numpy.uint32(16))


def _unmix64(values: _Words) -> _Words:
    """Invert `mix64`."""
    values = values ^ (values >> numpy.uint64(31)) ^ (values >> numpy.uint64(62))
    values = values * numpy.uint64(pow(MIX_2, -1, 2**64))
    values = values ^ (values >> numpy.uint64(27)) ^ (values >> numpy.uint64(54))
    values = values * numpy.uint64(pow(MIX_1, -1, 2**64))
    return values ^ (values >> numpy.uint64(30)) ^ (values >> numpy.uint64(60))
