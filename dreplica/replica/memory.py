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
