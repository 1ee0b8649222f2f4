"""Broadcast of one replica's tensors to all, so that a step can be compared even where states differed before it."""

from typing import Any

import torch
from torch import Tensor, nn

from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.nested import Path, leaves_of, replaced
from dreplica.state.replica import Parts
from dreplica.state.stages import Stage, make_stage
from dreplica.state.tensors import overwrite
from dreplica.state.walk import OPTIMIZER, StateWalk


def tensor_stages(parts: Parts) -> dict[str, Stage]:
    """Return digests of the tensors of `share_tensors`, by stage, in the order of their names."""
    stages: dict[str, dict[str, Tensor]] = {"buffers": {}, "optimizer": {}, "weights": {}}
    walk = StateWalk(parts)
    for path, tensor in walk.tensors().items():
        root, _, name = path.partition(".")
        stage = "optimizer" if root == OPTIMIZER else "weights" if isinstance(tensor, nn.Parameter) else "buffers"
        stages[stage][name] = tensor
    for number, other in enumerate(walk.others):
        for leaf, tensor in _arrays(other):
            stages["optimizer"][".".join(map(str, (type(other).__name__, number, *leaf)))] = tensor
    return {stage: make_stage(sorted(entries.items())) for stage, entries in stages.items()}


def _arrays(other: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors of several numbers in an object's `state_dict`."""
    leaves = leaves_of(other.state_dict())
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() != 1]


@torch.no_grad()
def share_tensors(parts: Parts, rank: int, channel: Channel) -> None:
    """Copy one rank's parameters, buffers and optimizer state to every replica.

    Everything else remains each replica's own: see `own_values`. Tensors are sent in the order of their names, so that
    optimizers may hold their parameters in different orders.

    Args:
        parts: This replica. All replicas must have tensors of the same names, dtypes and shapes, in the same groups:
            see `gather_layouts`.
        rank: The rank whose tensors all replicas get.
        channel: The control channel between all replicas.

    Raises:
        AttemptFailed: Some replica cannot send or load the tensors. It is raised on all replicas.

    Note:
        Collective: call on every rank.
    """
    if channel.size == 1:
        return
    walk = StateWalk(parts)
    tensors = sorted(walk.tensors().items())
    held = attempt(channel, lambda: _sendable(walk, tensors))
    for _, tensor in tensors:
        overwrite(tensor, channel.broadcast(tensor.detach().to("cpu", copy=True).contiguous(), rank))
    shared = channel.gather(held if channel.rank == rank else None)[rank]
    attempt(channel, lambda: _load(walk, shared))


def _sendable(walk: StateWalk, tensors: list[tuple[str, Tensor]]) -> list[list[tuple[Path, Tensor]]]:
    """Return the tensors of other objects. What cannot be sent raises here, before any replica waits for it."""
    for name, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = f"layout {tensor.layout}, dtype {tensor.dtype}, device {tensor.device}"
            raise ValueError(f"states differ, and {name} cannot be copied to the other replicas ({kind})")
    return [_arrays(other) for other in walk.others]


def _load(walk: StateWalk, shared: list[list[tuple[Path, Tensor]]]) -> None:
    for other, values in zip(walk.others, shared, strict=True):
        state = other.state_dict()
        for path, value in values:
            state = replaced(state, path, value)
        if values:
            other.load_state_dict(state)
