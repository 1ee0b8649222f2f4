"""Fingerprints of tensors where they are, on a GPU: one launch for any number of them, and nobody waits for it."""

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
"""Of a step, an evaluation and the final state, with room for batches of another size."""

Named = Sequence[tuple[str, Tensor]]


@dataclass
class _Plan:
    """What does not change from step to step."""

    headers: Tensor
    """(num_tensors, 2) int64: what the contents are added to."""
    table: Tensor
    programs: Tensor
    copied: list[int]
    """Numbers of tensors that the kernel cannot read as they lie in memory."""
    addresses: Tensor
    on_host: list[int]
    """The same; uploaded when they change."""


class DeviceHash:
    """Computes `multilinear.digest` of tensors on one device, in its current stream.

    So it comes after what was launched before, and what is launched later may overwrite the tensors. Between steps it
    keeps tables of a few hundred bytes for each tensor and 8 for each 64 KiB of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._plans: dict[tuple[object, ...], _Plan] = {}

    @torch.no_grad()
    def start(self, named: Named) -> Digests:
        """Launches the computation. Tensors are strided, with memory on this device; names may repeat."""
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
        self._plans[signature] = plan  # the newest last
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
            assert row is not None, "a contiguous tensor is read as it is"
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
    """Whether the kernel comes to what `multilinear` defines, in each of the ways in which it reads memory."""
    generator = torch.Generator("cpu").manual_seed(0)
    data = torch.randint(0, 256, (BLOCK_BYTES + 4104,), dtype=torch.uint8, device="cpu", generator=generator)
    there = data.to(device)
    named: list[tuple[str, Tensor]] = []
    expected = []
    for cut in (lambda row: row[:-8], lambda row: row[4:999], lambda row: row[1:], *map(_transposed, (1, 2, 4))):
        name, tensor, content = f"test{len(named)}", cut(there), cut(data).contiguous().view(-1).view(torch.uint8)
        named.append((name, tensor))
        expected.append(multilinear.digest(header(name, tensor.dtype, tensor.shape), content.numpy()))
    return DeviceHash(device).start(named).all == b"".join(expected)


def _transposed(itemsize: int) -> Callable[[Tensor], Tensor]:
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[itemsize]
    return lambda row: row[: 4096 // 8 * 7].view(dtype).view(7, -1).t()


def _header_lanes(name: str, tensor: Tensor) -> tuple[int, int]:
    return multilinear.header_lanes(header(name, tensor.dtype, tensor.shape))


def _resolved(tensor: Tensor) -> Tensor:
    """With conjugation and negation carried out, where they are still to come."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _on_host(addresses: list[int], pinned: bool) -> Tensor:
    """Pinned memory is not given to anyone else before the copy out of it is done."""
    return torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=pinned)
