"""In-place writes to tensors, which every holder of the tensor sees, and copies of them."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` (same shape) into `tensor`, whose elements may share memory (`expand`)."""
    if tensor.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, each into memory of an earlier copy if there is some of the same kind.

    Args:
        tensors: Name to tensor.
        memory: Name to a copy that is no longer needed.

    Returns:
        Name to copy, on the tensor's device.
    """
    copies: dict[str, Tensor] = {}
    sources, targets = [], []
    for name, tensor in tensors.items():
        target = memory.get(name)
        if target is None or not _same_kind(tensor, target):
            copies[name] = tensor.detach().clone()
            continue
        copies[name] = target
        sources.append(tensor.detach())
        targets.append(target)
    if targets:
        torch._foreach_copy_(targets, sources)  # one call: a large model has thousands of tensors
    return copies


def _same_kind(one: Tensor, other: Tensor) -> bool:
    if not type(one) is type(other) is Tensor and type(one) is not torch.nn.Parameter:
        return False
    if one.layout is not torch.strided or one.is_quantized or one.is_nested:
        return False
    kinds = [(each.shape, each.dtype, each.device, each.stride()) for each in (one, other)]
    return kinds[0] == kinds[1]


def to_device(
    tensor: Tensor, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """Copy a CPU tensor to a device without waiting for the copy.

    A copy from pageable memory waits for the device's stream or for its own end; one from pinned memory does not
    (https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html). So the tensor is pinned first.

    Args:
        tensor: The tensor, on the CPU. It may be released, but not written to, before the copy is complete.
        device: The target device.
        memory_format: The memory format of the copy.

    Returns:
        The tensor on `device`.
    """
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True, memory_format=memory_format)
