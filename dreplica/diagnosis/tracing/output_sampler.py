"""Samples of operators' results, which would be too large to keep."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.diagnosis.tracing.op_signature import signature_of
from dreplica.diagnosis.tracing.op_tracer import OpTracer

_MOST_ELEMENTS = 2**18
"""Number of elements to keep of one result, evenly spaced. Limits memory and what is sent between ranks."""


class OutputSampler(OpTracer):
    """Context manager that keeps samples of some operators' floating-point results, and records nothing.

    Args:
        optimizer: As for `OpTracer`.
        sampled: Positions of the operators, in `OpTracer.records` of an identical run.
        model: As for `OpTracer`.

    Attributes:
        samples: Results of each operator: sampled elements, 1-dim on the CPU, and the number of all elements.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, sampled: Collection[int], model: nn.Module | None
    ) -> None:
        super().__init__(optimizer, capture=-1, model=model, generators=True)
        self.samples: dict[int, list[tuple[Tensor, int]]] = {}
        self._sampled = frozenset(sampled)

    def _call_and_capture(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if number in self._sampled:
            outputs = signature_of(func).outputs(result, args, kwargs)
            self.samples[number] = [(_sample(tensor), tensor.numel()) for tensor in outputs if _is_floating(tensor)]
        return result


def _is_floating(tensor: Tensor) -> bool:
    """Return True for numbers whose distance is defined. Elements of packed dtypes are pairs of numbers."""
    packed = tensor.dtype is torch.float4_e2m1fn_x2
    plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
    return plain and not packed and (tensor.is_floating_point() or tensor.is_complex())


def _sample(tensor: Tensor) -> Tensor:
    stride = -(-tensor.numel() // _MOST_ELEMENTS) or 1
    return tensor.detach().reshape(-1)[::stride].to("cpu", copy=True)
