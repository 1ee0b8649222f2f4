"""Distance of diverged replicas from replica 0, by stage."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dreplica.diagnosis.evidence.provenance import optimizer_tensors
from dreplica.diagnosis.evidence.tensor_diff import compare_elements
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.stages import named_buffers, named_weights

Distance = dict[str, dict[str, list[float | int | None]]]
"""Distances by stage and measure (`max_ulp` or `l2`): one per replica, from replica 0."""


def measure_distance(replica: Replica, channel: Channel) -> Distance:
    """Measure the distance of each replica's weights, buffers and optimizer state from replica 0's.

    Only floating-point and complex tensors are compared.

    Returns:
        For each stage, `max_ulp`, the largest distance of two elements in units in the last place (None if NaN is
        involved), and `l2`, the Euclidean norm of the difference. Empty if replicas do not have the same tensors.

    Note:
        Collective: call on every rank.
    """
    stages = {
        "weights": _floating(named_weights(replica.model)),
        "buffers": _floating(named_buffers(replica.model)),
        "optimizer": _floating(optimizer_tensors(replica)),
    }
    described = {
        stage: [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        for stage, tensors in stages.items()
    }
    rows = channel.gather(described)
    if any(row != rows[0] for row in rows):
        return {}
    own = {stage: _distance_from_first(tensors, channel) for stage, tensors in stages.items() if tensors}
    gathered = channel.gather(own)
    return {
        stage: {"max_ulp": [row[stage][0] for row in gathered], "l2": [row[stage][1] for row in gathered]}
        for stage in own
    }


def _distance_from_first(tensors: Mapping[str, Tensor], channel: Channel) -> tuple[int | None, float]:
    largest: int | None = 0
    squares = 0.0
    for tensor in tensors.values():
        own = _real_numbers(tensor)
        first = channel.broadcast(own.clone())
        difference = compare_elements(first, own)
        if difference is None:
            continue
        squares += float((first.double() - own.double()).square().sum())
        largest = None if largest is None or difference.max_ulp is None else max(largest, difference.max_ulp)
    return largest, squares**0.5


def _floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the floating-point and complex tensors, except packed dtypes, whose elements are pairs of numbers."""
    return {
        name: tensor
        for name, tensor in sorted(tensors.items())
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype is not torch.float4_e2m1fn_x2)
    }


def _real_numbers(tensor: Tensor) -> Tensor:
    """Return a contiguous dense tensor on the CPU, with complex numbers as pairs of real ones."""
    dense = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).contiguous()
