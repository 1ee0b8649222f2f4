"""Where the memory that operators read comes from: which operator wrote it last, or that none did.

Memory is identified by its storage. A weak reference keeps a freed storage's identity from being given to another one.
Memory that was allocated without contents is followed element by element until all of it is written. What code outside
of operators writes, such as NumPy, is recognized because the contents are not those of the allocation any more.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dreplica.state.fingerprint.fingerprint import digest_tensor

OUTSIDE = -1
"""Origin of memory that no operator of the step wrote and that is not part of the replica's state."""
STATE = -2
"""Origin of memory of the replica's state or batch that no operator of the step has written yet."""
ALLOCATED = -3
"""Origin of memory that the step allocated and no recorded operator wrote."""
UNKNOWN = -4
"""Origin of memory that is not followed: tensors without plain memory."""

_MOST_BYTES = 2**28
"""Size of the largest allocation that is followed, since a copy of its contents is kept until it is written."""
_PARTIAL_WRITES = {
    *(f"aten.{name}" for name in ("index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "masked_fill_")),
    *(f"aten.{name}" for name in ("masked_scatter_", "scatter_", "scatter_reduce_", "put_", "_unsafe_index_put")),
    *(f"aten.{name}" for name in ("index_add_", "scatter_add_", "index_reduce_")),
}
"""Operators that may write to a part of their first argument only."""


@dataclass(frozen=True)
class Unwritten:
    """Memory without contents that an operator read."""

    position: int
    """Position among the tensors that the operator reads."""
    elements: int
    """Number of elements that nothing has written."""
    total: int
    """Number of elements of the tensor."""
    allocator: str
    """The operator that allocated the memory."""
    source: str
    """`file:line` of the code that allocated it."""
    rest: bytes
    """Digest of the tensor with zeros for the elements that nothing has written."""


@dataclass
class _Allocation:
    """Memory that was allocated without contents and is not completely written."""

    allocator: str
    source: str
    initial: Tensor
    """The contents at the allocation, 1-dim, in elements of the allocated dtype."""
    written: Tensor | None = None
    """True for each element of the storage that was written; None before the first write."""


class MemoryTracker:
    """Origins of the memory that a step reads.

    Args:
        state: Tensors of the replica's state and batch, known before the step.
    """

    def __init__(self, state: Iterable[Tensor] = ()) -> None:
        self._writers: dict[int, int] = {}
        self._kept: dict[int, StorageWeakRef] = {}
        self._allocations: dict[int, _Allocation] = {}
        for tensor in state:
            self._note(tensor, STATE)

    def origin(self, tensor: Tensor) -> int:
        """Return the position of the last operator that wrote the tensor's memory, or one of the constants."""
        key = _key(tensor)
        return UNKNOWN if key is None else self._writers.get(key, OUTSIDE)

    def allocate(self, tensor: Tensor, allocator: str, source: str) -> None:
        """Note memory that was allocated without contents.

        Args:
            tensor: The allocated tensor.
            allocator: The operator.
            source: `file:line` of the code that called it.
        """
        key = _key(tensor)
        if key is None:
            return
        allocation = self._allocations.get(key)
        if allocator.startswith("aten.resize_") and (
            self._writers.get(key) != ALLOCATED or (allocation is not None and allocation.written is not None)
        ):
            self._allocations.pop(key, None)
            return  # it keeps contents
        storage = tensor.untyped_storage()
        self._note(tensor, ALLOCATED)
        if not 0 < storage.nbytes() <= _MOST_BYTES or tensor.numel() == 0:
            return
        self._allocations[key] = _Allocation(allocator, source, _whole(tensor).clone())

    def write(self, tensor: Tensor, number: int, packet: str) -> None:
        """Note that an operator wrote a tensor.

        Args:
            tensor: The result, or the argument written to.
            number: Position of the operator.
            packet: Name of the operator without overload.
        """
        key = _key(tensor)
        if key is None:
            return
        if self._writers.get(key) is None:
            self._kept[key] = StorageWeakRef(tensor.untyped_storage())
        self._writers[key] = number
        allocation = self._allocations.get(key)
        if allocation is None:
            return
        now = _whole(tensor, allocation.initial.dtype)
        if tensor.element_size() != now.element_size() or now.numel() != allocation.initial.numel():
            del self._allocations[key]
        elif packet in _PARTIAL_WRITES:
            self._mark(key, allocation, _changed(now, allocation.initial))
        elif tensor.numel() == now.numel() and tensor.is_contiguous():
            del self._allocations[key]
        else:
            written = torch.zeros(now.numel(), dtype=torch.bool, device=tensor.device)
            _shown(written, tensor).fill_(True)
            self._mark(key, allocation, written)

    def unwritten(self, tensor: Tensor, position: int = 0) -> Unwritten | None:
        """Return the memory without contents that a tensor shows, or None if there is none.

        Args:
            tensor: The tensor to read.
            position: Its position among the tensors that the operator reads.
        """
        key = _key(tensor)
        allocation = None if key is None else self._allocations.get(key)
        if allocation is None:
            return None
        assert key is not None
        now = _whole(tensor, allocation.initial.dtype)
        if tensor.element_size() != now.element_size() or now.numel() != allocation.initial.numel():
            return None
        # Code outside of operators has written what is not as it was allocated.
        self._mark(key, allocation, _changed(now, allocation.initial))
        if key not in self._allocations:
            return None
        assert allocation.written is not None
        missing = ~_shown(allocation.written, tensor)
        count = int(missing.sum())
        if not count:
            return None
        rest = tensor.detach().clone()
        rest.view(_INTEGERS[rest.element_size()])[missing] = 0
        digest = digest_tensor("", rest)
        return Unwritten(position, count, tensor.numel(), allocation.allocator, allocation.source, digest)

    def _mark(self, key: int, allocation: _Allocation, written: Tensor) -> None:
        allocation.written = written if allocation.written is None else allocation.written | written
        if bool(allocation.written.all()):
            del self._allocations[key]

    def _note(self, tensor: Tensor, origin: int) -> None:
        key = _key(tensor)
        if key is not None:
            self._kept[key] = StorageWeakRef(tensor.untyped_storage())
            self._writers[key] = origin


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _key(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's memory, or None for a tensor without plain memory."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        return None
    return int(tensor.untyped_storage()._cdata)


def _whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return all memory of a tensor, 1-dim, without what is left of an element at its end."""
    storage, dtype = tensor.untyped_storage(), dtype or tensor.dtype
    whole = torch.empty(0, dtype=dtype, device=tensor.device)
    return whole.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def _shown(whole: Tensor, tensor: Tensor) -> Tensor:
    """Return the view of a flat tensor that a tensor shows of its storage."""
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _changed(now: Tensor, initial: Tensor) -> Tensor:
    bits = _INTEGERS[now.element_size()]
    return now.view(bits) != initial.view(bits)
