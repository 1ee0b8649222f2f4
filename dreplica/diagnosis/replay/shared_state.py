"""One replica's state given to all: what a step makes of it can then be compared, wherever they were before."""

from collections.abc import Sequence
from typing import Any

import torch

from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.snapshot import state_tensors
from dreplica.state.tensors import overwrite

Shape = tuple[str, tuple[int, ...], str]
"""Of a tensor: its name, shape and dtype."""


def shapes(parts: Parts) -> list[Shape]:
    """All tensors of the state; replicas on which these differ cannot be given one state."""
    return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state_tensors(parts).items()]


def differing_shapes(rows: Sequence[Sequence[Shape]]) -> list[str]:
    """The names of the tensors that not all replicas have, or not in one shape and dtype."""
    everything = dict.fromkeys(shape for row in rows for shape in row)
    return list(dict.fromkeys(shape[0] for shape in everything if not all(shape in row for row in rows)))


@torch.no_grad()
def share_state(parts: Parts, rank: int, channel: Channel) -> None:
    """Gives every replica that rank's state: tensors, the optimizers' settings, generators. A collective.

    `shapes` must be the same on all. Gradients, what modules hold in plain Python, and whether parameters require a
    gradient stay each replica's own. Raises AttemptFailed on all replicas where one cannot take the state over.
    """
    for tensor in state_tensors(parts).values():
        overwrite(tensor, channel.broadcast(tensor.detach().to("cpu", copy=True).contiguous(), rank))
    own = _settings(parts), [other.state_dict() for other in parts.others], get_rng_state()
    shared = channel.gather(own if channel.rank == rank else None)[rank]
    if channel.size > 1:
        attempt(channel, lambda: _take_over(parts, *shared))


def _settings(parts: Parts) -> list[list[dict[str, Any]]]:
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in parts.optimizers.values()
    ]


def _take_over(parts: Parts, settings: list[list[dict[str, Any]]], others: list[Any], rng: dict[str, Any]) -> None:
    for optimizer, groups in zip(parts.optimizers.values(), settings, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    for other, state in zip(parts.others, others, strict=True):
        other.load_state_dict(state)
    set_rng_state(rng)
