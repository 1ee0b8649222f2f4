"""The state of a replica in a checkpoint: copied, restored, and proved identical by its digests.

The pieces of the state come from `StateWalk`, as those of a snapshot do. A snapshot is restored into the very objects
that it was taken from, a checkpoint into a replica that another process has built.
"""

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.plain_state import GENERATORS
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.stages import (
    Entry,
    Stage,
    make_stage,
    named_buffers,
    named_weights,
    optimizer_entries,
    rng_entries,
)
from dreplica.state.walk import CRITERION, MODEL, StateWalk, generators_of
from dreplica.training.checkpoint.file_format import CheckpointError, Contents, rng_from_json, rng_to_json
from dreplica.training.checkpoint.portable import Originals, Portable, holds_arrays, is_portable, put_into

_PARAMETER, _OTHER = "parameter", "other"
_KINDS = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in GENERATORS}
"""Generator types that an object may hold, by the name that a checkpoint gives them."""
_KEPT_ELSEWHERE = vars(nn.Module()).keys() - {"training"} | {"state", "param_groups", "defaults"}
"""Attributes of modules and optimizers that a checkpoint saves separately or not at all."""

AsBuilt = Mapping[str, Mapping[str, Any]]
"""Plain attributes, without tensors and arrays, of a newly built replica, by path of the owner and name."""


@dataclass(frozen=True)
class StateCopy:
    """A copy of everything that the rest of a run depends on. Tensors are still on their device."""

    tensors: dict[str, Tensor]
    """Parameters and buffers of the model, by name."""
    optimizer: dict[str, Any]
    """All other state, in the form of `optimizer.pt`."""
    state: dict[str, Any]
    """JSON values for `state.json`, without digests."""
    entries: dict[str, list[Entry]]
    """The entries to hash, by stage."""

    def contents(self) -> Contents:
        """Move the copy to the CPU and compute its digests, which training need not wait for."""
        on_cpu = Portable(lambda tensor: tensor.cpu()).tensor
        tensors, optimizer, entries = tree_map_only(Tensor, on_cpu, (self.tensors, self.optimizer, self.entries))
        digests = {stage: _hex(make_stage(of_stage)) for stage, of_stage in entries.items()}
        return Contents(tensors, optimizer, self.state | {"digests": digests})


def attributes_as_built(replica: Replica) -> AsBuilt:
    """Copy the plain attributes of a replica that has just been built, for `copy_state` and `restore_state`."""
    return {
        path: {name: copy.deepcopy(value) for name, value in _attributes(owner).items() if not holds_arrays(value)}
        for path, owner in StateWalk(replica).owners.items()
    }


def copy_state(replica: Replica, position: Position, run: Mapping[str, Any], as_built: AsBuilt) -> StateCopy:
    """Copy the state of a replica so that training can continue while it is written.

    Args:
        replica: The replica, which is not changed.
        position: Position in the data to resume from.
        run: Further JSON values for `state.json`.
        as_built: What `attributes_as_built` returned. Attributes that still have these values are left out: one that
            says where the replica runs, for instance, differs in the replica that restores the copy.

    Returns:
        The copy, on the replica's device.
    """
    walk = StateWalk(replica)
    numbers = _numbers(walk.optimizers)
    copies = Portable(lambda tensor: tensor.detach().clone())
    optimizer = {
        "optimizers": [
            {
                "state": [(_key(key, numbers), copies.of(state)) for key, state in optimizer.state.items()],
                "groups": [copies.of(_settings(group)) for group in optimizer.param_groups],
            }
            for optimizer in walk.optimizers.values()
        ],
        "others": [copies.of(other.state_dict()) for other in walk.others],
        "criterion": {name: copies.tensor(tensor) for name, tensor in _tensors(replica.criterion).items()},
        "buffers": {
            path: {name: buffer is not None for name, buffer in module._buffers.items()}
            for path, module in walk.modules.items()
        },
        "attributes": {
            path: copies.of(_changed(_attributes(owner), as_built.get(path, {}))) for path, owner in walk.owners.items()
        },
        "generators": {path: copies.of(_generator_states(owner)) for path, owner in walk.owners.items()},
    }
    state = {
        "step": replica.steps_done,
        "position": position.as_dict(),
        **run,
        "rng": rng_to_json(get_rng_state()),
        "algorithm": ALGORITHM,
    }
    tensors = {name: copies.tensor(tensor) for name, tensor in _tensors(replica.model).items()}
    entries = {
        stage: [(name, copies.tensor(value) if isinstance(value, Tensor) else value) for name, value in of_stage]
        for stage, of_stage in _state_entries(replica).items()
    }
    return StateCopy(tensors, optimizer, state, entries)


def restore_state(replica: Replica, contents: Contents, as_built: AsBuilt) -> None:
    """Restore a saved state into a replica that was built like the saved one.

    Args:
        replica: The replica. If restoring fails, it is left partly restored.
        contents: The checkpoint. Its tensors become part of the replica.
        as_built: What `attributes_as_built` returned for this replica: values of attributes that are not in
            `contents`, which an earlier, failed restore may have changed.

    Raises:
        CheckpointError: The checkpoint is of another model or optimizer (`model-differs`, `state-does-not-fit`), has
            digests of another algorithm (`algorithm-differs`), or a restored tensor differs from its saved digest
            (`digest-differs`, which names the first such tensor).
    """
    state = contents.state
    if state["algorithm"] != ALGORITHM:
        raise CheckpointError(
            f"fingerprint algorithm differs: expected {ALGORITHM}, got {state['algorithm']}",
            code="algorithm-differs",
            expected=ALGORITHM,
            got=state["algorithm"],
        )
    _check_same_model(replica.model, contents.tensors)
    try:
        _restore(replica, contents, as_built)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        text = f"the saved state does not fit this replica: {type(error).__name__}: {error}"
        raise CheckpointError(text, code="state-does-not-fit") from error
    for stage, entries in _state_entries(replica).items():
        saved, now = state["digests"][stage], _hex(make_stage(entries))
        for name in [*saved, *now]:
            if saved.get(name) != now.get(name):
                text = f"{name} in {stage} differs from its saved digest after the restore"
                raise CheckpointError(text, code="digest-differs", stage=stage, tensor=name)


def _state_entries(replica: Replica) -> dict[str, list[Entry]]:
    """Return the entries of the stages that persist from step to step."""
    named = named_weights(replica.model)
    return {
        "buffers": list(named_buffers(replica.model).items()),
        "optimizer": list(optimizer_entries(named, replica.optimizer, *replica.others)),
        "weights": list(named.items()),
        "rng": rng_entries(),
    }


@torch.no_grad()
def _restore(replica: Replica, contents: Contents, as_built: AsBuilt) -> None:
    saved = contents.optimizer
    walk = StateWalk(replica)
    originals = Originals(next((parameter.device for parameter in replica.model.parameters()), torch.device("cpu")))
    tensors_of = {MODEL: contents.tensors, CRITERION: saved["criterion"]}
    for path, module in walk.modules.items():
        root, _, within = path.partition(".")
        _restore_buffers(module, saved["buffers"][path], within, tensors_of[root])
    for root, top in walk.roots.items():
        for name, tensor in _tensors(top).items():
            tensor.copy_(tensors_of[root][name])
    for other, state in zip(walk.others, saved["others"], strict=True):
        other.load_state_dict(originals.of(state))
    # Earlier versions saved only the optimizers that are attributes of the replica's optimizer.
    saved_paths = [path for path in saved["attributes"] if path not in saved["buffers"]]
    optimizers = {path: walk.optimizers[path] for path in saved_paths}
    parameters = list(_numbers(optimizers))
    for optimizer, kept in zip(optimizers.values(), saved["optimizers"], strict=True):
        for group, settings in zip(optimizer.param_groups, kept["groups"], strict=True):
            group.update(originals.of(settings))
        # In place, because an optimizer that wraps this one may share its state. Not by load_state_dict, which casts
        # the state to its parameter's dtype.
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        state = [_state_of(key, originals.of(values), parameters, groups) for key, values in kept["state"]]
        optimizer.state.clear()
        optimizer.state.update(state)
    for path, owner in (walk.modules | optimizers).items():
        unchanged = copy.deepcopy(_changed(as_built.get(path, {}), _attributes(owner)))
        for name, value in (unchanged | originals.of(saved["attributes"][path])).items():
            vars(owner)[name] = put_into(vars(owner).get(name), value)
        generators = generators_of(owner)
        for name, (kind, state) in saved["generators"][path].items():
            GENERATORS[_KINDS[kind]][1](generators[name], originals.of(state))
    replica.steps_done = contents.state["step"]
    set_rng_state(rng_from_json(contents.state["rng"]))


def _check_same_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        expected, got = tuple(parameter.shape), tuple(tensors[name].shape) if name in tensors else None
        if got != expected:
            what = "no such tensor" if got is None else got
            text = f"the checkpoint is of another model: {name}: expected shape {expected}, got {what}"
            raise CheckpointError(text, code="model-differs", tensor=name, expected=expected, got=got)


def _restore_buffers(module: nn.Module, before: Mapping[str, bool], path: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the module the buffers that the saved one had. A forward pass may add, replace or drop buffers."""
    for name in [name for name in module._buffers if name not in before]:
        delattr(module, name)
    for name, was_tensor in before.items():
        now = module._buffers.get(name)
        kept = tensors.get(f"{path}.{name}" if path else name)
        if not was_tensor:
            module._buffers[name] = None
        elif kept is not None and (now is None or not _can_hold(now, kept)):
            device = next((parameter.device for parameter in module.parameters()), kept.device)
            module._buffers[name] = kept.to(device)


def _can_hold(buffer: Tensor, kept: Tensor) -> bool:
    """Return True if the buffer can be overwritten in place, which an expanded one with shared elements cannot."""
    if (buffer.shape, buffer.dtype, buffer.layout) != (kept.shape, kept.dtype, kept.layout):
        return False
    if buffer.layout is not torch.strided:
        return True
    return all(stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True) if size > 1)


def _key(key: Any, numbers: Mapping[Tensor, int]) -> tuple[str, Any]:
    """Encode a key of an optimizer's state: the number of a parameter, or any other key unchanged."""
    return (_PARAMETER, numbers[key]) if isinstance(key, Tensor) and key in numbers else (_OTHER, key)


def _state_of(
    key: tuple[str, Any], values: Any, parameters: Sequence[Tensor], groups: Mapping[Tensor, Mapping[str, Any]]
) -> tuple[Any, Any]:
    """Decode a key of an optimizer's state, and move its values to the parameter's device."""
    kind, of = key
    if kind == _OTHER:
        return of, values
    parameter = parameters[of]
    group = groups.get(parameter, {})
    # As Optimizer.load_state_dict does: 0-dim step counts stay on the CPU unless the optimizer needs them elsewhere.
    counts_too = group.get("fused") or group.get("capturable")

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.device) if tensor.dim() or counts_too else tensor

    return parameter, tree_map_only(Tensor, place, values)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group that can be saved. Functions come from the config again."""
    return {key: value for key, value in group.items() if key != "params" and is_portable(value)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, non-persistent buffers included."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _attributes(owner: object) -> dict[str, Any]:
    """Return an owner's plain attributes, such as its mode, a counter, or a rate that a schedule changes."""
    return {name: value for name, value in vars(owner).items() if name not in _KEPT_ELSEWHERE and is_portable(value)}


def _changed(attributes: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that differ from before, and all with tensors or arrays.

    Values are compared as bytes: 0 differs from 0.0 and 0.0 from -0.0.
    """
    return {
        name: value
        for name, value in attributes.items()
        if holds_arrays(value)
        or name not in before
        or (value is not before[name] and pickle.dumps(value) != pickle.dumps(before[name]))
    }


def _generator_states(owner: object) -> dict[str, tuple[str, Any]]:
    return {
        name: (kind, GENERATORS[cls][0](generator))
        for name, generator in generators_of(owner).items()
        for kind, cls in _KINDS.items()
        if type(generator) is cls
    }


def _numbers(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[Tensor, int]:
    """Return a number for each parameter in the parameter groups, counting repeated parameters once."""
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    parameters = dict.fromkeys(parameter for group in groups for parameter in group["params"])
    return {parameter: number for number, parameter in enumerate(parameters)}


def _hex(stage: Stage) -> dict[str, str]:
    return {name: digest.hex() for name, digest in stage.entries().items()}
