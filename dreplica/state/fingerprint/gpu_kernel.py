"""Triton kernel that computes `multilinear.content` of any number of tensors in one launch.

Each program hashes one block (64 KiB) of one tensor and adds its two lanes to the tensor's row of the output.
Addition modulo 2^64 is commutative, so integer atomics give the same result in any order of programs.

The words of a block are loaded in one of four ways, the first that the memory layout allows:

- `unit` 4: strided elements of whole 32-bit words (`_strided`).
- `unit` 2 or 1: strided elements, assembled from units of 2 bytes or 1 byte (`_gather`).
- Contiguous, 16-byte aligned, a whole block: vectorized loads without a mask.
- Contiguous, 4-byte aligned: masked loads of words. Otherwise words are assembled from bytes (`_gather`).

All ways compute the same digest, that of the bytes in row-major order.
"""

# mypy: disallow-untyped-defs=False
# Triton functions take Triton tensors and compile-time constants, for which there are no useful annotations.

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.tensor_layout import FIELDS

_GOLDEN = tl.constexpr(multilinear.GOLDEN)
_COLUMN_SEED = tl.constexpr(multilinear.COLUMN_SEED)
_MIX_1, _MIX_2 = tl.constexpr(multilinear.MIX_1), tl.constexpr(multilinear.MIX_2)


def launch(addresses: Tensor, table: Tensor, programs: Tensor, out: Tensor) -> None:
    """Add each tensor's content to its row of `out`, in the current stream of the device.

    Args:
        addresses: The start of each tensor, (num_tensors,) int64.
        table: The memory layout of each tensor, (num_tensors, FIELDS) int64.
        programs: Tensor and block of each program, (num_programs, 2) int32, with each block of each tensor once.
        out: Two lanes of each tensor, (num_tensors, 2) int64, with the bits of the uint64 values of `multilinear`.
    """
    if not len(programs):
        return
    rows, columns = multilinear.ROWS, multilinear.COLUMNS
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _content[(len(programs),)](addresses, table, programs, out, rows, columns, FIELDS, num_warps=4)


@triton.jit
def _content(
    addresses,
    table,
    programs,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Hash one block of one tensor and add it to the tensor's row with integer atomics."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs + 2 * program).to(tl.int64)
    block = tl.load(programs + 2 * program + 1).to(tl.int64)
    fields = table + tensor * FIELDS
    start = block * (4 * ROWS * COLUMNS)
    left = tl.load(fields) - start
    num_rows = tl.minimum((left + (4 * COLUMNS - 1)) // (4 * COLUMNS), ROWS).to(tl.int32)
    address = tl.load(addresses + tensor)
    here = address + start  # where the block begins, if the tensor is contiguous
    columns = tl.arange(0, COLUMNS)
    sum_0 = tl.full((COLUMNS,), 0, tl.uint64)
    sum_1 = tl.full((COLUMNS,), 0, tl.uint64)
    unit = tl.load(fields + 1)
    if unit == 4:
        total_0, total_1 = _strided(address, fields, start, left, block, num_rows, COLUMNS)
    else:
        if unit > 0:
            for row in range(num_rows):
                at = row * COLUMNS + columns
                if unit == 2:
                    word = _gather(address, fields, start, left, at, 2, tl.uint16, True)
                else:
                    word = _gather(address, fields, start, left, at, 1, tl.uint8, True)
                sum_0, sum_1 = _add(sum_0, sum_1, word, row)
        elif (here % 16 == 0) & (left >= 4 * ROWS * COLUMNS):
            words = tl.multiple_of(here.to(tl.pointer_type(tl.uint32)), 16)
            for row in tl.static_range(ROWS):
                word = tl.load(words + (row * COLUMNS + columns))
                sum_0, sum_1 = _add(sum_0, sum_1, word, row)
        elif (here % 4 == 0) & (left % 4 == 0):
            words = here.to(tl.pointer_type(tl.uint32))
            for row in range(num_rows):
                at = row * COLUMNS + columns
                word = tl.load(words + at, mask=4 * at < left, other=0)
                sum_0, sum_1 = _add(sum_0, sum_1, word, row)
        else:
            for row in range(num_rows):
                word = _gather(address, fields, start, left, row * COLUMNS + columns, 1, tl.uint8, False)
                sum_0, sum_1 = _add(sum_0, sum_1, word, row)
        total_0, total_1 = _total(sum_0, sum_1, block * COLUMNS + columns)
    slot = out + 2 * tensor
    tl.atomic_add(slot, total_0, sem="relaxed")
    tl.atomic_add(slot + 1, total_1, sem="relaxed")


@triton.jit
def _total(sum_0, sum_1, columns):
    """Return what the column sums add to both lanes, as int64.

    `columns` are the columns' indices, counted through all blocks of the tensor.
    """
    columns = columns.to(tl.uint64)
    mixed_0 = _mix64(sum_0 + _mix64((columns * 2 + 1) * _GOLDEN + _COLUMN_SEED))
    mixed_1 = _mix64(sum_1 + _mix64((columns * 2 + 2) * _GOLDEN + _COLUMN_SEED))
    return tl.sum(mixed_0).to(tl.int64, bitcast=True), tl.sum(mixed_1).to(tl.int64, bitcast=True)


@triton.jit
def _add(sum_0, sum_1, word, row):
    """Add a row of words to the column sums of both lanes."""
    number = tl.full((), 0, tl.uint64) + row
    turned = (word << 16) | (word >> 16)
    sum_0 += word.to(tl.uint64) * (_mix64((number * 2 + 1) * _GOLDEN) | 1)
    sum_1 += turned.to(tl.uint64) * (_mix64((number * 2 + 2) * _GOLDEN) | 1)
    return sum_0, sum_1


@triton.jit
def _layout(fields):
    """Load log2 of an element's bytes, the sizes of the inner two dimensions and all three strides."""
    shift, size_1, size_2 = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    return shift, size_1, size_2, tl.load(fields + 5), tl.load(fields + 6), tl.load(fields + 7)


@triton.jit
def _strided(address, fields, start, left, block, num_rows, COLUMNS: tl.constexpr):
    """Return what a block of strided, word-aligned elements adds to both lanes.

    All weights of a convolutional network in channels_last are hashed this way. Each row is the same number of elements
    after the one before, so only the first row's indices need divisions; later rows add the step and carry.

    A row is processed in two halves. With the row shape of the other paths, Triton would assign four neighboring words
    to each thread, which is right for contiguous memory; here these words are far apart in memory.
    """
    HALF: tl.constexpr = COLUMNS // 2
    shift, size_1, size_2, stride_0, stride_1, stride_2 = _layout(fields)
    first = start >> shift
    first_1 = first // size_2
    first_0 = first_1 // size_1
    small_1, small_2 = size_1.to(tl.uint32), size_2.to(tl.uint32)
    step = (4 * COLUMNS) >> shift
    step_1 = step // size_2
    step_0 = step_1 // size_1
    step_2, step_1 = step - step_1 * size_2, step_1 - step_0 * size_1
    further = step_0 * stride_0 + step_1 * stride_1 + step_2 * stride_2
    carry_1, carry_2 = stride_0 - size_1 * stride_1, stride_1 - size_2 * stride_2
    total_0 = tl.full((), 0, tl.int64)
    total_1 = tl.full((), 0, tl.int64)
    for half in range(2):
        columns = half * HALF + tl.arange(0, HALF)
        byte = 4 * columns
        index_2 = ((byte >> shift) + (first - first_1 * size_2)).to(tl.uint32)
        index_1 = index_2 // small_2 + (first_1 - first_0 * size_1).to(tl.uint32)
        index_2 = index_2 % small_2
        index_0 = index_1 // small_1 + first_0
        index_1 = index_1 % small_1
        place = address + index_0 * stride_0 + index_1 * stride_1 + index_2 * stride_2 + (byte & ((1 << shift) - 1))
        sum_0 = tl.full((HALF,), 0, tl.uint64)
        sum_1 = tl.full((HALF,), 0, tl.uint64)
        for row in tl.range(num_rows, loop_unroll_factor=4):
            word = tl.load(place.to(tl.pointer_type(tl.uint32)), mask=byte < left - row * (4 * COLUMNS), other=0)
            sum_0, sum_1 = _add(sum_0, sum_1, word, row)
            index_2 += step_2.to(tl.uint32)
            over_2 = index_2 >= small_2
            index_2 = tl.where(over_2, index_2 - small_2, index_2)
            index_1 += step_1.to(tl.uint32) + over_2.to(tl.uint32)
            over_1 = index_1 >= small_1
            index_1 = tl.where(over_1, index_1 - small_1, index_1)
            place += further + tl.where(over_2, carry_2, 0) + tl.where(over_1, carry_1, 0)
        half_0, half_1 = _total(sum_0, sum_1, block * COLUMNS + columns)
        total_0 += half_0
        total_1 += half_1
    return total_0, total_1


@triton.jit
def _gather(address, fields, start, left, at, UNIT: tl.constexpr, UNIT_DTYPE: tl.constexpr, STRIDED: tl.constexpr):
    """Return the words `at` of a block, assembled from units of memory, and zero past the tensor's end.

    Only the start of the block needs 64-bit divisions. Indices relative to it fit in 32 bits.
    """
    shift, size_1, size_2, stride_0, stride_1, stride_2 = _layout(fields)
    first = start >> shift
    first_1 = first // size_2
    first_0 = first_1 // size_1
    word = tl.full(at.shape, 0, tl.uint32)
    for part in tl.static_range(4 // UNIT):
        byte = 4 * at + part * UNIT
        if STRIDED:
            within = byte & ((1 << shift) - 1)
            index_2 = ((byte >> shift) + first % size_2).to(tl.uint32)
            index_1 = index_2 // size_2.to(tl.uint32) + (first_1 % size_1).to(tl.uint32)
            index_2 = index_2 % size_2.to(tl.uint32)
            index_0 = index_1 // size_1.to(tl.uint32) + first_0
            index_1 = index_1 % size_1.to(tl.uint32)
            offset = index_0 * stride_0 + index_1 * stride_1 + index_2 * stride_2 + within
        else:
            offset = start + byte
        unit = tl.load((address + offset).to(tl.pointer_type(UNIT_DTYPE)), mask=byte < left, other=0)
        word |= unit.to(tl.uint32) << (8 * UNIT * part)
    return word


@triton.jit
def _mix64(value):
    """Return splitmix64's finalizer of `value`, as `multilinear.mix64` defines it."""
    value = (value ^ (value >> 30)) * _MIX_1
    value = (value ^ (value >> 27)) * _MIX_2
    return value ^ (value >> 31)
