"""Fingerprints of tensors on their GPU: one asynchronous launch for any number of tensors.

The kernel reads tables that describe the tensors: addresses, sizes, strides, and which block of which tensor each
program hashes. Building and uploading these tables takes longer than the launch, so they are kept in plans. A plan is
reused as long as names, dtypes, shapes, strides and the alignment of the addresses stay the same, as they do from step
to step; only changed addresses are uploaded again.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.fingerprint import header
from dreplica.state.fingerprint.gpu_kernel import launch
from dreplica.state.fingerprint.pending_digests import Digests
from dreplica.state.fingerprint.tensor_layout import BLOCK_BYTES, describe, programs

_MOST_PLANS = 8
"""Plans to keep: for a step, an evaluation and the final state, with a few more for batches of other sizes."""

Named = Sequence[tuple[str, Tensor]]


@dataclass
class _Plan:
    """Tables of the kernel that stay the same from step to step."""

    headers: Tensor
    """(num_tensors, 2) int64: the hashes of the headers, to which the kernel adds the contents."""
    table: Tensor
    """(num_tensors, FIELDS) int64: memory layout, see `tensor_layout`."""
    programs: Tensor
    """(num_programs, 2) int32: the tensor and the block of it that each program hashes."""
    copied: list[int]
    """Indices of tensors whose layout the kernel cannot read, which are copied at every step."""
    addresses: Tensor
    """(num_tensors,) int64: the start of each tensor."""
    on_host: list[int]
    """The addresses that were uploaded last."""


class DeviceHash:
    """Computation of `multilinear.digest` for tensors on one device, in its current stream.

    It runs after earlier work in that stream, and later work in it may overwrite the tensors. Between steps it keeps
    tables of a few hundred bytes for each tensor and 8 bytes for each 64 KiB of tensors.

    Args:
        device: The device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._plans: dict[tuple[object, ...], _Plan] = {}

    @torch.no_grad()
    def start(self, named: Named) -> Digests:
        """Launch the computation.

        Args:
            named: Names and strided tensors with memory on this device. Names may repeat.

        Returns:
            The digests, in the order of the tensors.
        """
        on_gpu = self.device.type == "cuda"
        named = [(name, _resolved(tensor)) for name, tensor in named]
        addresses = [tensor.data_ptr() for _, tensor in named]
        signature = (
            torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0,
            *(
                (name, tensor.dtype, tensor.shape, tensor.stride(), address & 3)
                for (name, tensor), address in zip(named, addresses, strict=True)
            ),
        )
        plan = self._plans.pop(signature, None) or self._plan(named)
        self._plans[signature] = plan  # most recently used last
        if len(self._plans) > _MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        copies = [named[number][1].contiguous() for number in plan.copied]
        for number, copy in zip(plan.copied, copies, strict=True):
            addresses[number] = copy.data_ptr()
        if addresses != plan.on_host:
            plan.addresses.copy_(_on_host(addresses, on_gpu), non_blocking=True)
            plan.on_host = addresses
        out = plan.headers.clone()
        launch(plan.addresses, plan.table, plan.programs, out)
        if not on_gpu:
            return Digests(out, None)
        rows = torch.empty(out.shape, dtype=out.dtype, device="cpu", pin_memory=True).copy_(out, non_blocking=True)
        written = torch.cuda.Event(blocking=True)
        written.record(torch.cuda.current_stream(self.device))
        return Digests(rows, written)

    def _plan(self, named: Named) -> _Plan:
        rows, copied = [], []
        for number, (_, tensor) in enumerate(named):
            row = describe(tensor)
            if row is None:
                row = describe(tensor.contiguous())
                copied.append(number)
            assert row is not None, "a contiguous tensor needs no copy"
            rows.append(row)
        headers = [struct.pack("<QQ", *_header_lanes(name, tensor)) for name, tensor in named]
        return _Plan(
            headers=torch.frombuffer(bytearray(b"".join(headers)), dtype=torch.int64).view(-1, 2).to(self.device),
            table=torch.tensor(rows, dtype=torch.int64, device=self.device),
            programs=programs(row[0] for row in rows).to(self.device),
            copied=copied,
            addresses=torch.zeros(len(named), dtype=torch.int64, device=self.device),
            on_host=[],
        )


def computes_as_defined(device: torch.device) -> bool:
    """Return True if the kernel's digests equal those of `multilinear`.

    Covers each way in which the kernel reads memory: aligned blocks, aligned rows, single bytes, and strided elements
    of 1, 2 and 4 bytes.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    data = torch.randint(0, 256, (BLOCK_BYTES + 4104,), dtype=torch.uint8, device="cpu", generator=generator)
    on_device = data.to(device)
    named: list[tuple[str, Tensor]] = []
    expected = []
    for cut in (lambda row: row[:-8], lambda row: row[4:999], lambda row: row[1:], *map(_transposed, (1, 2, 4))):
        name, tensor, content = f"test{len(named)}", cut(on_device), cut(data).contiguous().view(-1).view(torch.uint8)
        named.append((name, tensor))
        expected.append(multilinear.digest(header(name, tensor.dtype, tensor.shape), content.numpy()))
    return DeviceHash(device).start(named).all == b"".join(expected)


def _transposed(itemsize: int) -> Callable[[Tensor], Tensor]:
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[itemsize]
    return lambda row: row[: 4096 // 8 * 7].view(dtype).view(7, -1).t()


def _header_lanes(name: str, tensor: Tensor) -> tuple[int, int]:
    return multilinear.header_lanes(header(name, tensor.dtype, tensor.shape))


def _resolved(tensor: Tensor) -> Tensor:
    """Return the tensor with pending conjugation and negation (lazy views) carried out."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _on_host(addresses: list[int], pinned: bool) -> Tensor:
    """Return addresses as a tensor to upload from.

    PyTorch's allocator does not reuse pinned memory before the copy from it is complete.
    """
    return torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=pinned)
