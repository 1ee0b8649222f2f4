"""Values that enter a step from Python or NumPy: arguments of operators, and data of new tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dreplica.diagnosis.tracing.contents import digest_of

_MOST_SHOWN = 8
"""Values of a tensor from Python data that a record keeps."""
_HOST_KINDS = (bool, int, float, complex, str, torch.dtype, torch.memory_format, torch.layout, type(None))


def arguments_of_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of a call that are from Python: numbers, strings, flags, dtypes and memory formats.

    Devices are left out, since each replica has its own.
    """
    parts = [repr(leaf) for leaf in tree_leaves(args) if isinstance(leaf, _HOST_KINDS)]
    for name, value in kwargs.items():
        parts += [
            f"{name}={leaf!r}" for leaf in tree_leaves(value) if isinstance(leaf, _HOST_KINDS) and leaf is not None
        ]
    return ", ".join(parts)


def host_data(tensor: Tensor) -> str:
    """Return the values of a tensor made from Python or NumPy data: all of them if few, otherwise a digest too."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return repr(tensor.dtype)
    values = tensor.detach().flatten()[:_MOST_SHOWN].tolist()
    shown = repr(values[0] if not tensor.dim() and values else values)
    if tensor.numel() > _MOST_SHOWN:
        shown = f"{shown[:-1]}, ...] with digest {digest_of(tensor).hex()}"
    return f"{shown}, {tensor.dtype}, {tuple(tensor.shape)}"
