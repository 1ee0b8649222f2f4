"""Two replicas disagree on an operator's result: which of them is wrong, if either?

The operator is run once more, on the CPU in float64, from the same inputs. A result is possible if it lies within the
rounding error that the operator's own precision allows. For sums of n products that error is, with probability close to
one, at most a small multiple of sqrt(n) * u times the same sum over absolute values, u being the unit roundoff
(N. J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019).
In half precision only the result is rounded to it: products are summed in float32 (of which PyTorch's settings may take
something back on a GPU, as they may round the inputs of float32 products to TensorFloat-32).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dreplica.diagnosis.op_signature import tensors_in
from dreplica.diagnosis.operators import Captured

_CONVOLUTIONS = {"aten.convolution.default", "aten.convolution_backward.default"}
_MATRIX_PRODUCTS = {
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten.baddbmm.default",
    "aten.mv.default",
    "aten.dot.default",
}
_ELEMENTWISE = {"aten.mul.Tensor", "aten.add.Tensor"}
_REDUCTIONS = {"aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default"}
_KNOWN = _CONVOLUTIONS | _MATRIX_PRODUCTS | _ELEMENTWISE | _REDUCTIONS
"""Operators for which the same operator over absolute values bounds the error."""

_SAFETY = 8.0
_ROUNDOFF_TF32 = 2.0**-11
_FLOAT64 = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


@dataclass(frozen=True)
class Arbitration:
    """What the float64 run says of each side."""

    possible: list[bool]
    """Whether each side's result lies within rounding error."""
    evidence: list[str]


def arbitrate(
    captured: Captured, outputs: Sequence[Sequence[Tensor]], replica_ids: Sequence[int]
) -> Arbitration | None:
    """Judges each side's `outputs` (a list of tensors per side) of one captured operator.

    Where the absolute values could overflow, or an input is infinite or not a number, every result counts as possible.
    Returns None for an operator whose error it has no bound for.
    """
    if captured.function not in _KNOWN:
        return None
    exact, magnitude, terms = (_run(captured, convert) for convert in (_double, _absolute, _ones))
    if captured.function in _REDUCTIONS:
        terms = [size * 0 + captured.inputs[0].numel() / max(size.numel(), 1) for size in magnitude]
    if captured.function in _CONVOLUTIONS:
        # Winograd and FFT mix neighbouring elements, so each element's error goes with the size of its neighbours.
        magnitude = [size.amax().expand_as(size) if size.numel() else size for size in magnitude]
    possible, evidence = [], []
    for replica_id, side in zip(replica_ids, outputs, strict=True):
        parts = zip(side, exact, magnitude, terms, strict=True)
        worst = max((_excess(*part, _roundoff(captured, part[0].dtype)) for part in parts), default=0.0)
        possible.append(worst <= 1.0)
        judged = "within" if worst <= 1.0 else "outside"
        evidence.append(
            f"in float64 from the same inputs, replica {replica_id}'s result is {judged} rounding error "
            f"({worst:.3g} of the bound)"
        )
    return Arbitration(possible, evidence)


def _run(captured: Captured, convert: Callable[[Tensor | float], Any]) -> list[Tensor]:
    """The operator's results, None among them left out, with `convert` applied to what it computes with."""
    namespace, name, overload = captured.function.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    args, kwargs = captured.arguments
    scalars = captured.function in _ELEMENTWISE
    converted = tree_map(lambda leaf: convert(leaf) if _is_number(leaf, scalars) else leaf, args)
    factors = {key: convert(value) for key, value in kwargs.items() if key in {"alpha", "beta"}}
    # A reduction may be told its result's dtype, and nothing else decides here.
    dtype = {"dtype": torch.float64} if kwargs.get("dtype") in {torch.float16, torch.bfloat16, torch.float32} else {}
    return tensors_in(function(*converted, **{**kwargs, **factors, **dtype}))


def _is_number(leaf: Any, scalars: bool) -> bool:
    return isinstance(leaf, Tensor) or (scalars and isinstance(leaf, int | float) and not isinstance(leaf, bool))


def _double(value: Tensor | float) -> Any:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(_FLOAT64.get(value.dtype, torch.float64))


def _absolute(value: Tensor | float) -> Any:
    if not isinstance(value, Tensor):
        return abs(value)
    return value if value.dtype is torch.bool else value.abs().double()


def _ones(value: Tensor | float) -> Any:
    """With every number 1, a sum of products is the number of its terms."""
    return torch.ones_like(value, dtype=torch.float64) if isinstance(value, Tensor) else 1


def _roundoff(captured: Captured, dtype: torch.dtype) -> float:
    """Of one product or addition on the way to a result of `dtype`."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    if captured.function in _ELEMENTWISE:
        return torch.finfo(dtype).eps / 2  # `add` rounds a term before it adds it
    on_gpu = captured.device_type == "cuda"
    matmul = torch.backends.cuda.matmul
    if on_gpu and dtype in {torch.float16, torch.bfloat16} and captured.function in _MATRIX_PRODUCTS:
        fp16 = dtype is torch.float16
        reduced = (
            matmul.allow_fp16_reduced_precision_reduction if fp16 else matmul.allow_bf16_reduced_precision_reduction
        )
        if reduced:
            return torch.finfo(dtype).eps / 2
    tf32 = torch.backends.cudnn.allow_tf32 if captured.function in _CONVOLUTIONS else matmul.allow_tf32
    if on_gpu and tf32 and captured.function in _CONVOLUTIONS | _MATRIX_PRODUCTS:
        return max(_ROUNDOFF_TF32, torch.finfo(torch.float32).eps / 2)
    return torch.finfo(torch.float64 if dtype in {torch.float64, torch.complex128} else torch.float32).eps / 2


def _excess(result: Tensor, exact: Tensor, magnitude: Tensor, terms: Tensor, roundoff: float) -> float:
    """The largest error as a multiple of its bound; infinite where the result is not a number and should be one."""
    if not result.numel():
        return 0.0
    if roundoff == 0.0:
        return 0.0 if torch.equal(result, exact.to(result.dtype)) else float("inf")
    limits = torch.finfo(result.dtype)
    bound = _SAFETY * (terms.clamp(min=1).sqrt() * roundoff * magnitude + limits.smallest_normal)
    bound = bound + limits.eps * exact.abs()
    error = (result.to(exact.dtype) - exact).abs()
    judged = (magnitude < limits.max) & magnitude.isfinite()
    return float((error / bound)[judged].nan_to_num(nan=float("inf")).max()) if judged.any() else 0.0
