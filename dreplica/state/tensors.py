"""Tensors are written to in place, so that whoever holds them sees it."""

import torch
from torch import Tensor


@torch.no_grad()
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copies `values` (same shape) into `tensor`, which may be an expanded one, whose elements share memory."""
    if tensor.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def to_device(
    tensor: Tensor, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """`tensor` (CPU) on `device`; it may be given up, but not written to, before the copy is done.

    A copy out of ordinary memory waits for the device's stream, or for its own end; one out of pinned memory does not
    (https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html).
    """
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True, memory_format=memory_format)
