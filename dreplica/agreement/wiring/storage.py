"""Checks that no two parameters or buffers of a model overlap in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.wiring.fault import WiringError
from dreplica.state.stages import named_buffers, named_weights


@dataclass(frozen=True)
class _Span:
    """The address range from a tensor's first byte to its last."""

    device: str
    start: int
    end: int
    name: str
    tensor: Tensor

    @property
    def is_dense(self) -> bool:
        """True if the tensor uses every byte of the range, so that any tensor that overlaps it shares memory."""
        filled = self.tensor.numel() * self.tensor.element_size()
        return self.end - self.start == filled and 0 not in self.tensor.stride()


def storage_faults(model: nn.Module) -> Iterator[WiringError]:
    """Yield a fault for each pair of different parameters or buffers that overlap in memory.

    A DTensor, or another subclass that wraps tensors, overlaps where the tensors in it do: for a sharded parameter, in
    this rank's shard.
    """
    # A sweep over addresses: a tensor is compared only with the earlier ones that reach past its start.
    pending: list[_Span] = []
    for span in sorted(_spans(model), key=lambda span: (span.device, span.start, span.end)):
        pending = [other for other in pending if other.device == span.device and other.end > span.start]
        for other in pending:
            if other.name != span.name and _share_bytes(other, span):
                yield WiringError(
                    f"{other.name!r} and {span.name!r} are different tensors in the same memory: an update of one also "
                    "changes the other.",
                    code="storage-shared",
                    tensor=span.name,
                    remedies=[
                        Remedy.of("tie-tensors", tensor=span.name, other=other.name),
                        Remedy.of("separate-tensors", tensor=span.name),
                    ],
                    other=other.name,
                )
        pending.append(span)


def _spans(model: nn.Module) -> Iterator[_Span]:
    """Yield the address range of each parameter and buffer that has memory, once for a tensor with several names."""
    seen = set()
    for name, whole in [*named_weights(model).items(), *named_buffers(model).items()]:
        for tensor in _inner_tensors(whole):
            if id(tensor) in seen or not _has_addresses(tensor):
                continue
            seen.add(id(tensor))
            start = tensor.data_ptr()
            if tensor.numel() and start:  # 0 in a storage that was freed, as FSDP does
                yield _Span(str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name, tensor)


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold a tensor's memory: those in a wrapper such as a DTensor, or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for inner in (getattr(tensor, name) for name in names):
        if isinstance(inner, Tensor):  # a DTensor lists its mesh, too
            yield from _inner_tensors(inner)


def _has_addresses(tensor: Tensor) -> bool:
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and not is_lazy(tensor) and not tensor.is_meta


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share_bytes(one: _Span, other: _Span) -> bool:
    """Return True if two tensors with overlapping ranges have a byte in common.

    Interleaved tensors, such as columns of one matrix, overlap in range but share no byte.
    """
    if one.is_dense and other.is_dense:
        return True
    start, end = min(one.start, other.start), max(one.end, other.end)
    used = torch.zeros(2, end - start, dtype=torch.bool)
    for row, span in zip(used, (one, other), strict=True):
        size = span.tensor.element_size()
        bytes_of_elements = row[span.start - start : span.end - start].view(-1, size)
        strides = (*(stride * size for stride in span.tensor.stride()), 1)
        bytes_of_elements.as_strided((*span.tensor.shape, size), strides).fill_(1)
    return bool(used.all(dim=0).any())
