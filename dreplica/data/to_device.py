"""Moves tensors to a GPU without waiting for it."""

import torch
from torch import Tensor


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
