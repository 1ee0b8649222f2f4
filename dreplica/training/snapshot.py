"""The whole state of a replica, kept in memory: taken at an agreed step, restored to replay from it."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.replica.replica import Replica
from dreplica.replica.rng import get_rng_state, set_rng_state


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a training step reads or writes. Tensors stay on their device."""

    tensors: dict[str, Tensor]
    """Parameters and buffers of model and criterion."""
    buffers: dict[str, dict[str, bool]]
    """Of each module of either: the buffers registered there, and whether there is a tensor or None."""
    gradients: dict[str, Tensor | None]
    modes: dict[str, bool]
    optimizer_state: list[tuple[Tensor, dict[str, Any]]]
    """(parameter itself, copy of its state)."""
    optimizer_groups: list[dict[str, Any]]
    others: list[dict[str, Any]]
    """State of the scheduler and the scaler."""
    rng: dict[str, Any]
    steps_done: int


def take_snapshot(replica: Replica) -> Snapshot:
    """Copies the state; the replica is not changed."""
    return Snapshot(
        tensors={name: tensor.detach().clone() for name, tensor in _tensors(replica).items()},
        buffers={
            path: {name: buffer is not None for name, buffer in module._buffers.items()}
            for path, module in _modules(replica)
        },
        gradients={name: _copy(parameter.grad) for name, parameter in replica.model.named_parameters()},
        modes={name: module.training for name, module in replica.model.named_modules()},
        optimizer_state=[(parameter, _copy(state)) for parameter, state in replica.optimizer.state.items()],
        optimizer_groups=[_copy(_settings(group)) for group in replica.optimizer.param_groups],
        others=[_copy(other.state_dict()) for other in _others(replica)],
        rng=get_rng_state(),
        steps_done=replica.steps_done,
    )


@torch.no_grad()
def restore_snapshot(replica: Replica, snapshot: Snapshot) -> None:
    """Puts the state back, byte for byte; parameters and buffers keep their identity and memory.

    Only a buffer that a forward pass has added, replaced by one of another shape, or taken away since is another tensor
    afterwards.
    """
    _restore_buffers(replica, snapshot)
    for name, tensor in _tensors(replica).items():
        tensor.copy_(snapshot.tensors[name])
    for name, parameter in replica.model.named_parameters():
        parameter.grad = _copy(snapshot.gradients[name])
    for name, module in replica.model.named_modules():
        module.training = snapshot.modes[name]
    # Not load_state_dict, which casts the state to its parameter's dtype.
    replica.optimizer.state = defaultdict(
        dict, {parameter: _copy(state) for parameter, state in snapshot.optimizer_state}
    )
    for group, settings in zip(replica.optimizer.param_groups, snapshot.optimizer_groups, strict=True):
        group.update(_copy(settings))
    for other, state in zip(_others(replica), snapshot.others, strict=True):
        other.load_state_dict(_copy(state))
    replica.steps_done = snapshot.steps_done
    set_rng_state(snapshot.rng)


def _restore_buffers(replica: Replica, snapshot: Snapshot) -> None:
    for path, module in _modules(replica):
        before = snapshot.buffers.get(path, {})
        for name in [name for name in module._buffers if name not in before]:
            delattr(module, name)
        for name, was_tensor in before.items():
            kept, now = snapshot.tensors.get(path + name), module._buffers.get(name)
            if not was_tensor and now is not None:
                module._buffers[name] = None
            elif kept is not None and (now is None or (now.shape, now.dtype) != (kept.shape, kept.dtype)):
                module._buffers[name] = kept.clone()


def _tensors(replica: Replica) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for prefix, module in (("model.", replica.model), ("criterion.", replica.criterion)):
        named |= {prefix + name: tensor for name, tensor in module.named_parameters()}
        named |= {prefix + name: tensor for name, tensor in module.named_buffers()}
    return named


def _modules(replica: Replica) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in (("model.", replica.model), ("criterion.", replica.criterion)):
        for path, module in root.named_modules():
            yield prefix + (f"{path}." if path else ""), module


def _others(replica: Replica) -> list[Any]:
    return [other for other in (replica.scheduler, replica.scaler) if other is not None]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copy(value: Any) -> Any:
    """A deep copy in which tensors are detached clones."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return copy.deepcopy(value)
