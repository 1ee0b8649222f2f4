"""Broadcast of one replica's state to all, so that a step can be compared even where states differed before it."""

from collections.abc import Sequence
from typing import Any

import torch

from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.tensors import overwrite
from dreplica.state.walk import StateWalk

Shape = tuple[str, tuple[int, ...], str]
"""Name, shape and dtype of a tensor."""


def shapes(parts: Parts) -> list[Shape]:
    """Return name, shape and dtype of every state tensor, which `share_state` requires to be equal on all replicas."""
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in StateWalk(parts).tensors().items()]


def differing_shapes(rows: Sequence[Sequence[Shape]]) -> list[str]:
    """Return the names of tensors that some replica lacks, or has with another shape or dtype.

    Args:
        rows: What `shapes` returned on each replica.
    """
    everything = dict.fromkeys(shape for row in rows for shape in row)
    return list(dict.fromkeys(shape[0] for shape in everything if not all(shape in row for row in rows)))


@torch.no_grad()
def share_state(parts: Parts, rank: int, channel: Channel) -> None:
    """Copy one rank's tensors, optimizer settings and random generators to every replica.

    Gradients, plain attributes of modules, and `requires_grad` remain each replica's own.

    Args:
        parts: This replica, whose `shapes` must be those of all others.
        rank: The rank whose state all replicas get.
        channel: The control channel between all replicas.

    Raises:
        AttemptFailed: Some replica cannot load the state. It is raised on all replicas.

    Note:
        Collective: call on every rank.
    """
    walk = StateWalk(parts)
    for tensor in walk.tensors().values():
        overwrite(tensor, channel.broadcast(tensor.detach().to("cpu", copy=True).contiguous(), rank))
    own = _settings(parts), [other.state_dict() for other in walk.others], get_rng_state()
    shared = channel.gather(own if channel.rank == rank else None)[rank]
    if channel.size > 1:
        attempt(channel, lambda: _load(parts, *shared))


def _settings(parts: Parts) -> list[list[dict[str, Any]]]:
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in parts.optimizers.values()
    ]


def _load(parts: Parts, settings: list[list[dict[str, Any]]], others: list[Any], rng: dict[str, Any]) -> None:
    for optimizer, groups in zip(parts.optimizers.values(), settings, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    for other, state in zip(parts.others, others, strict=True):
        other.load_state_dict(state)
    set_rng_state(rng)
