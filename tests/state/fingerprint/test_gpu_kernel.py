"""The kernel computes what `multilinear` defines, on a GPU or in Triton's interpreter."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.tensor_layout import BLOCK_BYTES, describe, programs
from tests.harness import REPOSITORY

gpu_kernel = pytest.importorskip("dreplica.state.fingerprint.gpu_kernel", reason="needs Triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (
    torch.bool,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def noise(num_bytes: int, offset: int = 0) -> Tensor:
    """Return (num_bytes,) uint8 that begins `offset` bytes after the start of an allocation."""
    generator = torch.Generator().manual_seed(num_bytes)
    raw = torch.randint(0, 256, (num_bytes + offset,), dtype=torch.uint8, generator=generator)
    return raw.to(DEVICE)[offset:]


def shaped(dtype: torch.dtype, *shape: int) -> Tensor:
    raw = noise(math.prod(shape) * dtype.itemsize)
    return (raw % 2).bool().reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)


def contents(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the digests that the kernel computes in one launch."""
    rows = [describe(tensor) for tensor in tensors]
    assert all(rows)
    out = torch.zeros(len(tensors), 2, dtype=torch.int64, device=DEVICE)
    gpu_kernel.launch(
        torch.tensor([tensor.data_ptr() for tensor in tensors], device=DEVICE),
        torch.tensor(rows, device=DEVICE),
        programs(row[0] for row in rows).to(DEVICE),
        out,
    )
    return _lanes(out)


def _lanes(out: Tensor) -> list[tuple[int, int]]:
    return [(low, high) for low, high in out.cpu().numpy().view(numpy.uint64).tolist()]


def defined(tensor: Tensor) -> tuple[int, int]:
    elements = tensor.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return multilinear.content(elements.view(torch.uint8).numpy())


def test_launch_hashes_any_dtype_shape_and_layout() -> None:
    tensors = []
    for dtype in DTYPES:
        matrix = shaped(dtype, 13, 21)
        tensors += [matrix.t(), matrix[:, ::3], matrix[1:, 1:], matrix[0, 0], matrix[:0]]
    images = shaped(torch.float32, 3, 5, 4, 6)
    tensors += [
        images.contiguous(memory_format=torch.channels_last),
        images[:, :, ::2, ::2],
        images[0].expand(2, 5, 4, 6),
    ]
    tensors += [images.permute(2, 0, 1, 3).permute(1, 2, 0, 3), shaped(torch.float32, 2, 3, 2, 2, 2).transpose(0, 1)]
    assert contents(tensors) == [defined(tensor) for tensor in tensors]


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8, 12])
def test_launch_hashes_any_alignment(offset: int) -> None:
    sizes = (1, 4, 4099, BLOCK_BYTES + 8 if offset % 4 == 0 else 0)
    tensors = [noise(size, offset) for size in sizes]
    assert contents(tensors) == [defined(tensor) for tensor in tensors]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_launch_hashes_random_tensors(data: st.DataObject) -> None:
    tensors = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        tensor = shaped(data.draw(st.sampled_from(DTYPES)), *shape)
        tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
        for dimension in range(tensor.dim()):
            step = data.draw(st.integers(1, 3))
            tensor = tensor[(slice(None),) * dimension + (slice(data.draw(st.integers(0, 2)), None, step),)]
        tensors.append(tensor)
    assert contents(tensors) == [defined(tensor) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128])
def test_launch_hashes_several_blocks(dtype: torch.dtype) -> None:
    matrix = shaped(dtype, BLOCK_BYTES // dtype.itemsize // 64, 66)
    images = shaped(dtype, 7, 45, 5, 188 // dtype.itemsize)
    tensors = [
        matrix,
        matrix.t(),
        images.contiguous(memory_format=torch.channels_last),
        images[:, :1].expand(images.shape),
    ]
    assert contents(tensors) == [defined(tensor) for tensor in tensors]


@pytest.mark.parametrize("strided", [False, True])
def test_launch_hashes_over_2_to_the_31_elements(strided: bool) -> None:
    """Only the last block is computed, so only its memory is touched."""
    if strided:
        tensor = torch.empty(2, 65537, 16385, dtype=torch.uint8, device=DEVICE).permute(1, 0, 2)
        end = tensor[-3:]
    else:
        tensor = torch.empty(2**31 + 5, dtype=torch.uint8, device=DEVICE)
        end = tensor[-BLOCK_BYTES:]
    end.copy_(noise(end.numel()).view(end.shape))
    last = tensor.numel() // BLOCK_BYTES
    tail = end.reshape(-1)[last * BLOCK_BYTES - tensor.numel() :]
    assert 0 < tail.numel() < BLOCK_BYTES
    out = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    gpu_kernel.launch(
        torch.tensor([tensor.data_ptr()], device=DEVICE),
        torch.tensor([describe(tensor)], device=DEVICE),
        torch.tensor([[0, last]], dtype=torch.int32, device=DEVICE),
        out,
    )
    assert _lanes(out) == [_content_of_last_block(tail.cpu().numpy(), last)]


def _content_of_last_block(data: numpy.ndarray, number: int) -> tuple[int, int]:
    rows, columns = multilinear.ROWS, multilinear.COLUMNS
    words = numpy.zeros(rows * columns, numpy.uint32)
    words.view(numpy.uint8)[: data.size] = data
    words = words.reshape(rows, columns)
    positions = number * columns + numpy.arange(columns, dtype=numpy.uint64)
    lanes = []
    for lane, own in enumerate((words, words << 16 | words >> 16)):
        sums = (own.astype(numpy.uint64) * multilinear.row_keys(lane)[:, None]).sum(axis=0, dtype=numpy.uint64)
        mixed = multilinear.mix64(sums + multilinear.column_keys(lane, positions))
        lanes.append(int(mixed.sum(dtype=numpy.uint64)))
    return lanes[0], lanes[1]


def test_programs_cover_each_block_once() -> None:
    sizes = [0, 1, BLOCK_BYTES, 0, BLOCK_BYTES + 1, 3 * BLOCK_BYTES]
    expected = [(1, 0), (2, 0), (4, 0), (4, 1), (5, 0), (5, 1), (5, 2)]
    assert [tuple(row) for row in programs(sizes).tolist()] == expected


def test_describe_rejects_layouts_that_need_a_copy() -> None:
    images = torch.zeros(4, 6, 8, 10)
    assert describe(images.to(memory_format=torch.channels_last)) is not None
    assert describe(images.to(memory_format=torch.channels_last)[:, :, ::2, ::2]) is None
    assert describe(torch.zeros(1, dtype=torch.bool).expand(2**31)) is None


@pytest.mark.parametrize(("offset", "unit"), [(0, 4), (2, 2), (1, 1)])
def test_describe_units_are_aligned(offset: int, unit: int) -> None:
    """A GPU cannot load across its alignment, though a CPU can."""
    memory = bytearray(8 * 15 + 8)
    row = describe(torch.frombuffer(memory, dtype=torch.float64, count=15, offset=offset).view(3, 5).t())
    assert row is not None
    assert row[1] == unit


_COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dreplica.state.fingerprint import gpu_kernel, multilinear

constants = {"ROWS": multilinear.ROWS, "COLUMNS": multilinear.COLUMNS, "FIELDS": gpu_kernel.FIELDS}
types = {"addresses": "*i64", "table": "*i64", "programs": "*i32", "out": "*i64"}
source = ASTSource(gpu_kernel._content, types | dict.fromkeys(constants, "constexpr"), constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
ptx = compiled.asm["ptx"]
blocks = re.split(r"^(?=\\$L__BB)", ptx, flags=re.MULTILINE)
loops = [block for block in blocks if re.search(r"bra\\S*\\s+" + re.escape(block.partition(":")[0]) + ";", block)]
words = [loop for loop in loops if "ld.global.b32" in loop]
slow = [name for loop in words for name in ("div.", "rem.", "bar.") if name in loop]
instructions = re.findall(r"(?:ld\\.global|atom|red\\.global|[ls][td]\\.local)\\S*", ptx)
print(len(compiled.asm["cubin"]), len(words), *slow, *instructions)
"""


def test_kernel_compiles_for_a_gpu() -> None:
    """The interpreter does not show this, and compiling needs no GPU. Whole blocks are loaded 16 bytes at a time.

    The loops that load strided words contain no division and no barrier.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    cubin, loops, *instructions = process.stdout.split()
    assert int(cubin) > 0
    assert int(loops) >= 2  # in order, and strided
    assert not [name for name in instructions if name in ("div.", "rem.", "bar.")]
    per_thread = BLOCK_BYTES // (4 * 32) // 16
    assert instructions.count("ld.global.v4.b32") == per_thread
    assert len([name for name in instructions if name.startswith(("atom", "red"))]) == 2
    assert not [name for name in instructions if "local" in name]
