"""The whole state of a replica, kept in memory: taken at an agreed step, restored to replay from it."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.state.plain_state import KeptTensor, PlainState
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.stages import named_buffers, named_weights, parameter_names

_MOST_BYTES = 2**20
"""Larger buffers are not kept after each evaluation: statistics are smaller, and there may be many short epochs."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a training step reads or writes. Tensors stay on their device."""

    tensors: dict[str, KeptTensor]
    """Parameters and buffers of model and criterion, and the optimizer's state: `model.head.bias`,
    `optimizer.head.bias.momentum_buffer`."""
    gradients: dict[str, Tensor | None]
    """Named as the parameters are in `tensors`."""
    plain: PlainState
    """Of the modules of model and criterion, their modes and hooks included, of the optimizer, its settings included,
    and of the scaler, whose `state_dict` would wait for the device."""
    others: list[dict[str, Any]]
    """State of the scheduler."""
    rng: dict[str, Any]
    steps_done: int

    def find(self, stage: str, name: str) -> Tensor | None:
        """A tensor of the model or its optimizer, as the stage names it; None if there is none."""
        if stage == "gradients":
            return self.gradients.get(f"model.{name}")
        kept = self.tensors.get(f"optimizer.{name}" if stage == "optimizer" else f"model.{name}")
        return None if kept is None else kept.values


def take_snapshot(replica: Parts) -> Snapshot:
    """Copies the state; the replica is not changed."""
    named = state_tensors(replica)
    # A buffer that autograd has made is kept without its graph, in which there may be a step's activations.
    tensors = {name: KeptTensor.of(tensor if tensor.is_leaf else tensor.detach()) for name, tensor in named.items()}
    return Snapshot(
        tensors=tensors,
        gradients={name: _copy(parameter.grad) for name, parameter in _parameters(replica)},
        plain=PlainState(_owners(replica), [tensor for tensor in named.values() if tensor.is_leaf], _is_optimizer),
        others=[_copy(other.state_dict()) for other in _with_state_dict(replica)],
        rng=get_rng_state(),
        steps_done=replica.steps_done,
    )


@torch.no_grad()
def restore_snapshot(replica: Parts, snapshot: Snapshot) -> None:
    """Puts the state back, byte for byte.

    Parameters, buffers and the optimizer's state are the same tensors in the same memory as at the snapshot, whatever
    has come to stand in their place since; only gradients are new ones.
    """
    for other, state in zip(_with_state_dict(replica), snapshot.others, strict=True):
        other.load_state_dict(_copy(state))
    snapshot.plain.restore()
    for tensor in snapshot.tensors.values():
        tensor.put_back()
    for name, parameter in _parameters(replica):
        parameter.grad = _copy(snapshot.gradients[name])
    replica.steps_done = snapshot.steps_done
    set_rng_state(snapshot.rng)


def state_beside_weights(replica: Parts) -> PlainState:
    """Of the modules of model and criterion, all but parameters and large tensors: what an evaluation may change."""
    return PlainState(_modules(replica), max_bytes=_MOST_BYTES)


def state_tensors(replica: Parts) -> dict[str, Tensor]:
    """Parameters, buffers and the optimizers' state, named as in `Snapshot.tensors`."""
    named: dict[str, Tensor] = {}
    for prefix, module in (("model.", replica.model), ("criterion.", replica.criterion)):
        named |= {prefix + name: tensor for name, tensor in named_weights(module).items()}
        named |= {prefix + name: tensor for name, tensor in named_buffers(module).items()}
    for own_name, optimizer in replica.optimizers.items():
        names = parameter_names(replica.model, optimizer, own_name)
        for parameter, state in _states(optimizer):
            named |= {
                f"optimizer.{names.get(parameter)}.{key}": value
                for key, value in state.items()
                if isinstance(value, Tensor)
            }
    return named


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    """(parameter, its state); a key that is no parameter, and state that is no mapping, are plain state."""
    return ((key, state) for key, state in optimizer.state.items() if isinstance(state, Mapping))


def _parameters(replica: Parts) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in (("model.", replica.model), ("criterion.", replica.criterion)):
        for name, parameter in named_weights(module).items():
            yield prefix + name, parameter


def _modules(replica: Parts) -> list[nn.Module]:
    return [*replica.model.modules(), *replica.criterion.modules()]


def _owners(replica: Parts) -> list[object]:
    """What has state in its attributes: also objects of the optimizer's own that it keeps as a parameter's state."""
    optimizers = replica.optimizers.values()
    kept = [value for optimizer in optimizers for _, state in _states(optimizer) for value in state.values()]
    scalers = [other for other in replica.others if isinstance(other, torch.amp.GradScaler)]
    return [*_modules(replica), *optimizers, *scalers, *(value for value in kept if not isinstance(value, Tensor))]


def _with_state_dict(replica: Parts) -> list[Any]:
    return [other for other in replica.others if not isinstance(other, torch.amp.GradScaler)]


def _is_optimizer(value: object) -> bool:
    """One optimizer may wrap another."""
    return isinstance(value, torch.optim.Optimizer)


def _copy(value: Any) -> Any:
    """A deep copy in which tensors are detached clones."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return copy.deepcopy(value)
