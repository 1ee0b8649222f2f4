"""In-memory snapshots of a replica, taken at a step on which replicas agree and restored to replay from it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreplica.state.plain_state import KeptTensor, PlainState
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.tensors import copy_tensors
from dreplica.state.walk import StateWalk

_MAX_BYTES = 2**20
"""Size limit of buffers copied after each evaluation. Statistics are smaller, and epochs may be short and many."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a training step reads or writes. Tensors stay on their device."""

    tensors: dict[str, KeptTensor]
    """Parameters, buffers and optimizer state tensors, named as by `StateWalk.tensors`."""
    gradients: dict[str, Tensor | None]
    """Gradients of all parameters, named as the parameters are in `tensors`."""
    plain: PlainState
    """Attributes of modules (modes and hooks included), optimizers and scalers.

    A scaler is copied by its attributes, because its `state_dict` synchronizes with the device.
    """
    others: list[dict[str, Any]]
    """The `state_dict` of each further object, such as the scheduler."""
    rng: dict[str, Any]
    """State of the global generators."""
    steps_done: int
    """Number of steps taken before the snapshot."""

    def find(self, stage: str, name: str) -> Tensor | None:
        """Return a tensor under the name that its stage gives it.

        Args:
            stage: The stage, such as `weights`, `gradients` or `optimizer`.
            name: Name of the tensor in that stage, such as `head.bias`.

        Returns:
            The copied tensor on its device, or None if there is no such tensor.
        """
        if stage == "gradients":
            return self.gradients.get(f"model.{name}")
        kept = self.tensors.get(f"optimizer.{name}" if stage == "optimizer" else f"model.{name}")
        return None if kept is None else kept.values


def take_snapshot(replica: Parts, reuse: Snapshot | None = None) -> Snapshot:
    """Copy the state of a replica without changing it.

    Args:
        replica: The replica.
        reuse: A snapshot that is no longer needed, whose memory is overwritten.
    """
    walk = StateWalk(replica)
    named = walk.tensors()
    # A buffer that autograd has made is copied without its graph, which may hold a step's activations.
    plain = {name: tensor if tensor.is_leaf else tensor.detach() for name, tensor in named.items()}
    values = copy_tensors(plain, {name: kept.values for name, kept in reuse.tensors.items()} if reuse else {})
    gradients = {name: parameter.grad for name, parameter in walk.parameters().items()}
    existing = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    memory = {name: gradient for name, gradient in reuse.gradients.items() if gradient is not None} if reuse else {}
    owners = [*walk.owners.values(), *walk.scalers, *walk.state_objects]
    return Snapshot(
        tensors={name: KeptTensor.of(tensor, values[name]) for name, tensor in plain.items()},
        gradients=dict.fromkeys(gradients) | copy_tensors(existing, memory),
        plain=PlainState(owners, [tensor for tensor in named.values() if tensor.is_leaf]),
        others=[_copy(other.state_dict()) for other in _with_state_dict(replica)],
        rng=get_rng_state(),
        steps_done=replica.steps_done,
    )


@torch.no_grad()
def restore_snapshot(replica: Parts, snapshot: Snapshot) -> None:
    """Restore a replica to a snapshot of it, byte for byte.

    Parameters, buffers and optimizer state become the same tensor objects in the same memory as at the time of the
    snapshot, even if they have been replaced since. Only gradients are new tensors.
    """
    for other, state in zip(_with_state_dict(replica), snapshot.others, strict=True):
        other.load_state_dict(_copy(state))
    snapshot.plain.restore()
    for tensor in snapshot.tensors.values():
        tensor.restore()
    # The modules are those of the snapshot again, so their parameters are, too.
    for name, parameter in StateWalk(replica).parameters().items():
        parameter.grad = _copy(snapshot.gradients[name])
    replica.steps_done = snapshot.steps_done
    set_rng_state(snapshot.rng)


def copy_evaluated_state(replica: Parts) -> PlainState:
    """Copy what an evaluation may change: attributes and small buffers of model and criterion, not parameters."""
    return PlainState(StateWalk(replica).modules.values(), max_bytes=_MAX_BYTES)


def _with_state_dict(replica: Parts) -> list[Any]:
    return [other for other in replica.others if not isinstance(other, torch.amp.GradScaler)]


def _copy(value: Any) -> Any:
    """Return a deep copy in which tensors are detached clones."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return copy.deepcopy(value)
