"""Broadcast of one replica's state to all, so that a step can be compared even where states differed before it."""

import pickle
from typing import Any

import torch
from torch import Tensor

from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.tensors import overwrite
from dreplica.state.walk import StateWalk


@torch.no_grad()
def share_state(parts: Parts, rank: int, channel: Channel) -> None:
    """Copy one rank's tensors, optimizer settings and random generators to every replica.

    Gradients, plain attributes of modules, and `requires_grad` remain each replica's own. Tensors are sent in the order
    of their names, so that optimizers may hold their parameters in different orders.

    Args:
        parts: This replica. All replicas must have tensors of the same names, dtypes and shapes, in the same groups:
            see `gather_layouts`.
        rank: The rank whose state all replicas get.
        channel: The control channel between all replicas.

    Raises:
        AttemptFailed: Some replica cannot send or load the state. It is raised on all replicas.

    Note:
        Collective: call on every rank.
    """
    if channel.size == 1:
        return
    walk = StateWalk(parts)
    tensors = sorted(walk.tensors().items())
    settings = attempt(channel, lambda: _settings(parts, walk, tensors))
    for _, tensor in tensors:
        overwrite(tensor, channel.broadcast(tensor.detach().to("cpu", copy=True).contiguous(), rank))
    shared = channel.gather(settings if channel.rank == rank else None)[rank]
    attempt(channel, lambda: _load(parts, *pickle.loads(shared)))


def _settings(parts: Parts, walk: StateWalk, tensors: list[tuple[str, Tensor]]) -> bytes:
    """Return what is not in tensors. What cannot be sent raises here, before any replica waits for it."""
    for name, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = f"layout {tensor.layout}, dtype {tensor.dtype}, device {tensor.device}"
            raise ValueError(f"states differ, and {name} cannot be copied to the other replicas ({kind})")
    groups = {
        name: [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for name, optimizer in parts.optimizers.items()
    }
    return pickle.dumps((groups, [other.state_dict() for other in walk.others], get_rng_state()))


def _load(parts: Parts, settings: dict[str, list[dict[str, Any]]], others: list[Any], rng: dict[str, Any]) -> None:
    for name, groups in settings.items():
        for group, values in zip(parts.optimizers[name].param_groups, groups, strict=True):
            group.update(values)
    for other, state in zip(parts.others, others, strict=True):
        other.load_state_dict(state)
    set_rng_state(rng)
