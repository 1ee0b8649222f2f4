"""Two replicas disagree on an operator's result: which of them is wrong, if either?

The operator is run once more, on the CPU in float64, from the same inputs. A result is possible if it lies within the
rounding error that the operator's own precision allows. For sums of n products that error is, with probability close to
one, at most a small multiple of sqrt(n) * u times the same sum over absolute values, u being the unit roundoff
(N. J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dreplica.diagnosis.operators import Captured

_SUMS_OF_PRODUCTS = {
    "aten.convolution.default",
    "aten.convolution_backward.default",
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten.mul.Tensor",
    "aten.sum.dim_IntList",
    "aten.mean.dim",
}
"""Operators for which the same operator over absolute values bounds the error."""

_SAFETY = 8.0


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

    Returns None for an operator whose error it has no bound for.
    """
    if captured.function not in _SUMS_OF_PRODUCTS:
        return None
    exact, magnitude = (_run(captured, convert) for convert in (_double, _absolute))
    terms = max(tensor.numel() for tensor in captured.inputs)
    possible, evidence = [], []
    for replica_id, side in zip(replica_ids, outputs, strict=True):
        worst = max(
            (
                _excess(result, reference, size, terms)
                for result, reference, size in zip(side, exact, magnitude, strict=False)
            ),
            default=0.0,
        )
        possible.append(worst <= 1.0)
        judged = "within" if worst <= 1.0 else "outside"
        evidence.append(
            f"in float64 from the same inputs, replica {replica_id}'s result is {judged} rounding error "
            f"({worst:.3g} of the bound)"
        )
    return Arbitration(possible, evidence)


def _run(captured: Captured, convert: Any) -> list[Tensor]:
    namespace, name, overload = captured.function.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    args, kwargs = tree_map(lambda leaf: convert(leaf) if isinstance(leaf, Tensor) else leaf, captured.arguments)
    return [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _absolute(tensor: Tensor) -> Tensor:
    return tensor.double().abs() if tensor.is_floating_point() else tensor


def _excess(result: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> float:
    """The largest error as a multiple of its bound; infinite where the result is not a number and should be one."""
    roundoff = torch.finfo(result.dtype).eps / 2
    bound = _SAFETY * terms**0.5 * roundoff * magnitude + torch.finfo(result.dtype).tiny
    error = (result.double() - exact).abs()
    return float((error / bound).nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
