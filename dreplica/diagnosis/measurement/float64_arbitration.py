"""Arbitration between two replicas that disagree on an operator's result, by running the operator in float64.

The operator is run once more, on the CPU in float64, from the same inputs. If it does not round (it selects, moves or
compares numbers), only this result is possible. Otherwise a result is possible if it is within the rounding error of
the operator's precision. For sums of n products this error is, with probability close to one, at most a small multiple
of sqrt(n) * u times the same sum over absolute values, where u is the unit roundoff (N. J. Higham and T. Mary, "A New
Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019). In half precision, products are
summed in float32 and only the result is rounded. On a GPU, PyTorch's settings may allow reduced-precision sums, and
TensorFloat-32 for the inputs of float32 products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.tracing.op_signature import tensors_in
from dreplica.diagnosis.tracing.op_tracer import Captured
from dreplica.environment.determinism import fp32_precision

_CONVOLUTIONS = {"aten.convolution.default", "aten.convolution_backward.default"}
_MATRIX_PRODUCTS = {
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten.baddbmm.default",
    "aten.mv.default",
    "aten.dot.default",
}
_ELEMENTWISE = {"aten.mul.Tensor", "aten.add.Tensor", "aten.mul_.Tensor", "aten.add_.Tensor"}
_REDUCTIONS = {"aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default"}
_KNOWN = _CONVOLUTIONS | _MATRIX_PRODUCTS | _ELEMENTWISE | _REDUCTIONS
"""Operators whose rounding error is bounded by the same operator over absolute values."""
_EXACT = {
    *("aten.relu.default", "aten.relu_.default", "aten.threshold_backward.default", "aten.neg.default"),
    *("aten.hardtanh.default", "aten.hardtanh_.default", "aten.hardtanh_backward.default", "aten.abs.default"),
    *("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default", "aten.where.self"),
    *("aten.maximum.default", "aten.minimum.default", "aten.amax.default", "aten.amin.default", "aten.cat.default"),
    *("aten.index_select.default", "aten.gather.default", "aten.embedding.default", "aten.index.Tensor"),
    *("aten.constant_pad_nd.default", "aten.masked_fill.Scalar", "aten.flip.default", "aten.clone.default"),
}
"""Operators that do not round, so that float64 gives the only possible result in any precision."""

_BY_NUMPY: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default"), numpy.matmul),
    **dict.fromkeys(
        ("aten.addmm.default", "aten.baddbmm.default"), lambda c, a, b, beta=1, alpha=1: beta * c + alpha * (a @ b)
    ),
    **dict.fromkeys(("aten.mul.Tensor", "aten.mul_.Tensor"), numpy.multiply),
    **dict.fromkeys(("aten.add.Tensor", "aten.add_.Tensor"), lambda a, b, alpha=1: a + alpha * b),
    **dict.fromkeys(("aten.relu.default", "aten.relu_.default"), lambda a: numpy.maximum(a, 0)),
}
"""NumPy versions of the operators, to check whether torch in float64 is right on this processor."""

_SAFETY = 8.0
_ROUNDOFF = {"ieee": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
"""Unit roundoff of float32 operations, by the precision that `fp32_precision` reports."""
_FLOAT64_AGREES = 1e-10
_TINY = 1e-300
_FLOAT64 = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


@dataclass(frozen=True)
class Arbitration:
    """The result of the float64 run for each side."""

    possible: list[bool]
    """For each side, True if its result is within rounding error."""
    evidence: list[Evidence]
    """One piece of evidence per side."""
    trusted: bool = True
    """False if NumPy has the operator and gives another result in float64.

    A faulty processor may compute wrong results in float64, too.
    """


def arbitrate(
    captured: Captured, outputs: Sequence[Sequence[Tensor]], replica_ids: Sequence[int]
) -> Arbitration | None:
    """Judge which sides' results of a captured operator are possible.

    Sparse tensors are converted to dense ones. Where absolute values could overflow, or an input is infinite or NaN,
    every result counts as possible, unless the operator does not round.

    Args:
        captured: The operator with its inputs.
        outputs: The output tensors of each side.
        replica_ids: The replica of each side.

    Returns:
        The judgement, or None for an operator whose rounding error has no known bound.
    """
    if captured.function not in _KNOWN | _EXACT:
        return None
    exact = _run(captured, _double)
    magnitude, terms = exact, exact
    if captured.function in _KNOWN:
        magnitude, terms = (_run(captured, convert) for convert in (_absolute, _ones))
    if captured.function in _REDUCTIONS:
        terms = [size * 0 + captured.inputs[0].numel() / max(size.numel(), 1) for size in magnitude]
    if captured.function in _CONVOLUTIONS:
        # Winograd and FFT mix neighboring elements, so an element's error depends on the size of its neighbors.
        magnitude = [size.amax().expand_as(size) if size.numel() else size for size in magnitude]
    possible, evidence, exact_only = [], [], captured.function in _EXACT
    for replica_id, side in zip(replica_ids, outputs, strict=True):
        parts = zip(map(_dense, side), exact, magnitude, terms, strict=True)
        worst = max((_excess(*part, _roundoff(captured, part[0].dtype)) for part in parts), default=0.0)
        possible.append(worst <= 1.0)
        codes = ("float64-unequal", "float64-equal") if exact_only else ("float64-outside", "float64-within")
        evidence.append(Evidence.of(codes[worst <= 1.0], replica=replica_id, ratio=worst))
    return Arbitration(possible, evidence, _agrees_with_numpy(captured, exact[0], magnitude[0]))


def _agrees_with_numpy(captured: Captured, exact: Tensor, magnitude: Tensor) -> bool:
    by_numpy = _BY_NUMPY.get(captured.function)
    if by_numpy is None or not (exact.is_floating_point() or exact.is_complex()):
        return True
    args, kwargs = _converted(captured, lambda leaf: _double(leaf).numpy() if isinstance(leaf, Tensor) else leaf)
    with numpy.errstate(all="ignore"):
        error = numpy.abs(numpy.asarray(by_numpy(*args, **kwargs)) - exact.numpy())
    judged = numpy.isfinite(error) & numpy.isfinite(magnitude.numpy())
    # The tolerance is far above float64's rounding error and far below float32's.
    return bool((error <= _FLOAT64_AGREES * numpy.abs(magnitude.numpy()) + _TINY)[judged].all())


def _run(captured: Captured, convert: Callable[[Tensor | float], Any]) -> list[Tensor]:
    """Run the operator with `convert` applied to its numbers, and return its results without None."""
    namespace, name, overload = captured.function.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    args, kwargs = _converted(captured, convert)
    # A reduction may be given a dtype for its result, which would override float64.
    dtype = {"dtype": torch.float64} if kwargs.get("dtype") in {torch.float16, torch.bfloat16, torch.float32} else {}
    return tensors_in(function(*args, **{**kwargs, **dtype}))


def _converted(captured: Captured, convert: Callable[[Tensor | float], Any]) -> tuple[Any, dict[str, Any]]:
    """Return positional and keyword arguments, made dense, with `convert` applied to numbers."""
    args, kwargs = tree_map(lambda leaf: _dense(leaf) if isinstance(leaf, Tensor) else leaf, captured.arguments)
    scalars = captured.function in _ELEMENTWISE
    converted = tree_map(lambda leaf: convert(leaf) if _is_number(leaf, scalars) else leaf, args)
    return converted, {key: convert(value) if key in {"alpha", "beta"} else value for key, value in kwargs.items()}


def _is_number(leaf: Any, scalars: bool) -> bool:
    return isinstance(leaf, Tensor) or (scalars and isinstance(leaf, int | float) and not isinstance(leaf, bool))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _double(value: Tensor | float) -> Any:
    """Return the value in float64. Tensors are copied, because the operator may write to them."""
    if not isinstance(value, Tensor):
        return value
    if not (value.is_floating_point() or value.is_complex()):
        return value.clone()
    return value.to(_FLOAT64.get(value.dtype, torch.float64), copy=True)


def _absolute(value: Tensor | float) -> Any:
    if not isinstance(value, Tensor):
        return abs(value)
    return value.clone() if value.dtype is torch.bool else value.abs().double()


def _ones(value: Tensor | float) -> Any:
    """Return ones in place of all numbers, with which a sum of products is the number of its terms."""
    return torch.ones_like(value, dtype=torch.float64) if isinstance(value, Tensor) else 1


def _roundoff(captured: Captured, dtype: torch.dtype) -> float:
    """Return the unit roundoff of one product or addition in computing a result of `dtype`."""
    if captured.function in _EXACT or not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    if captured.function in _ELEMENTWISE:
        return torch.finfo(dtype).eps / 2  # `add` rounds a term before it adds it
    if dtype in {torch.float64, torch.complex128}:
        return torch.finfo(torch.float64).eps / 2
    on_gpu = captured.device_type == "cuda"
    matmul = torch.backends.cuda.matmul
    if on_gpu and dtype in {torch.float16, torch.bfloat16} and captured.function in _MATRIX_PRODUCTS:
        fp16 = dtype is torch.float16
        reduced = (
            matmul.allow_fp16_reduced_precision_reduction if fp16 else matmul.allow_bf16_reduced_precision_reduction
        )
        if reduced or (fp16 and matmul.allow_fp16_accumulation):
            return torch.finfo(dtype).eps / 2
    if captured.function in _REDUCTIONS:
        return _ROUNDOFF["ieee"]
    convolves = captured.function in _CONVOLUTIONS
    library = (
        ("cudnn.conv" if convolves else "cuda.matmul") if on_gpu else f"onednn.{'conv' if convolves else 'matmul'}"
    )
    return _ROUNDOFF[fp32_precision()[library]]


def _excess(result: Tensor, exact: Tensor, magnitude: Tensor, terms: Tensor, roundoff: float) -> float:
    """Return the largest error as a multiple of its bound, infinite if a result is NaN and should be a number."""
    if not result.numel():
        return 0.0
    if roundoff == 0.0:
        expected = exact.to(result.dtype)
        same = (result == expected) | ((result != result) & (expected != expected))  # both are NaN
        return 0.0 if bool(same.all()) else float("inf")
    limits = torch.finfo(result.dtype)
    bound = _SAFETY * (terms.clamp(min=1).sqrt() * roundoff * magnitude + limits.smallest_normal)
    bound = bound + limits.eps * exact.abs()
    error = (result.to(exact.dtype) - exact).abs()
    judged = (magnitude < limits.max) & magnitude.isfinite()
    return float((error / bound)[judged].nan_to_num(nan=float("inf")).max()) if judged.any() else 0.0
