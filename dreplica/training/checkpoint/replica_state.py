"""A replica's state as a checkpoint holds it: what is saved, and how it is put back and proved to be the same.

Unlike a snapshot, which is restored into the very objects it was taken of, it is restored into a replica that another
process has built.
"""

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
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
from dreplica.training.checkpoint.file_format import CheckpointError, Contents, rng_from_json, rng_to_json
from dreplica.training.checkpoint.portable import Originals, Portable, holds_arrays, is_portable, put_into

_MODEL, _CRITERION, _OPTIMIZER = "model", "criterion", "optimizer"
_PARAMETER, _OTHER = "parameter", "other"
_KINDS = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in GENERATORS}
"""Of an object's own generators: a checkpoint's word for each type."""
_KEPT_ELSEWHERE = vars(nn.Module()).keys() - {"training"} | {"state", "param_groups", "defaults"}
"""Attributes of modules and optimizers that are not plain state of theirs."""

AsBuilt = Mapping[str, Mapping[str, Any]]
"""Plain attributes without tensors or arrays as they were when the replica had been built, by owner and name."""


@dataclass(frozen=True)
class Copied:
    """A copy of everything that the rest of a run depends on; tensors are on their device still."""

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    entries: dict[str, list[Entry]]
    """What each stage's digests are taken of."""

    def contents(self) -> Contents:
        """What a checkpoint holds, with digests: the part of saving that training need not wait for."""
        on_cpu = Portable(lambda tensor: tensor.cpu()).tensor
        tensors, optimizer, entries = tree_map_only(Tensor, on_cpu, (self.tensors, self.optimizer, self.entries))
        digests = {stage: _hex(make_stage(of_stage)) for stage, of_stage in entries.items()}
        return Contents(tensors, optimizer, self.state | {"digests": digests})


def attributes_as_built(replica: Replica) -> AsBuilt:
    """Taken of a replica that has been built and has done nothing yet, for `copy_state`."""
    return {
        path: {name: copy.deepcopy(value) for name, value in _attributes(owner).items() if not holds_arrays(value)}
        for path, owner in _owners(replica)
    }


def copy_state(replica: Replica, position: Position, run: Mapping[str, Any], as_built: AsBuilt) -> Copied:
    """Copies the state out of training's way.

    `run`: what else belongs into `state.json`, as JSON values. `as_built`: attributes that are still so are left out:
    one that says where a replica runs, say, is not that of the replica that restores the copy.
    """
    numbers = _numbers(replica)
    copies = Portable(lambda tensor: tensor.detach().clone())
    optimizer = {
        "optimizers": [
            {
                "state": [(_key(key, numbers), copies.of(state)) for key, state in optimizer.state.items()],
                "groups": [copies.of(_settings(group)) for group in optimizer.param_groups],
            }
            for _, optimizer in _optimizers(replica)
        ],
        "others": [copies.of(other.state_dict()) for other in _others(replica)],
        "criterion": {name: copies.tensor(tensor) for name, tensor in _tensors(replica.criterion).items()},
        "buffers": {
            path: {name: buffer is not None for name, buffer in module._buffers.items()}
            for path, module in _modules(replica)
        },
        "attributes": {
            path: copies.of(_changed(_attributes(owner), as_built.get(path, {}))) for path, owner in _owners(replica)
        },
        "generators": {path: copies.of(_own_generators(owner)) for path, owner in _owners(replica)},
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
    return Copied(tensors, optimizer, state, entries)


def restore_state(replica: Replica, contents: Contents, as_built: AsBuilt) -> None:
    """Puts a saved state into a replica that was built as the saved one was; tensors of `contents` become part of it.

    `as_built`: attributes that are not in `contents` were so; they may have changed with a state that did not fit.

    Raises CheckpointError if it is another model's or optimizer's, or if anything does not come out with the digest it
    was saved with, naming the first such tensor; what is restored by then is not undone.
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
        _put_back(replica, contents, as_built)
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
    """All that lasts from step to step, stage by stage."""
    named = named_weights(replica.model)
    return {
        "buffers": list(named_buffers(replica.model).items()),
        "optimizer": list(optimizer_entries(named, replica.optimizer, *_others(replica))),
        "weights": list(named.items()),
        "rng": rng_entries(),
    }


@torch.no_grad()
def _put_back(replica: Replica, contents: Contents, as_built: AsBuilt) -> None:
    saved = contents.optimizer
    originals = Originals(next((parameter.device for parameter in replica.model.parameters()), torch.device("cpu")))
    for path, module in _modules(replica):
        prefix, tensors = (_MODEL, contents.tensors) if path.startswith(_MODEL) else (_CRITERION, saved["criterion"])
        _restore_buffers(module, saved["buffers"][path], path.removeprefix(prefix).removeprefix("."), tensors)
    for module, tensors in ((replica.model, contents.tensors), (replica.criterion, saved["criterion"])):
        for name, tensor in _tensors(module).items():
            tensor.copy_(tensors[name])
    for other, state in zip(_others(replica), saved["others"], strict=True):
        other.load_state_dict(originals.of(state))
    parameters = list(_numbers(replica))
    for (_, optimizer), kept in zip(_optimizers(replica), saved["optimizers"], strict=True):
        for group, settings in zip(optimizer.param_groups, kept["groups"], strict=True):
            group.update(originals.of(settings))
        # In place, for one optimizer may wrap another and share it; not by load_state_dict, which casts the state to
        # its parameter's dtype.
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        state = [_state_of(key, originals.of(values), parameters, groups) for key, values in kept["state"]]
        optimizer.state.clear()
        optimizer.state.update(state)
    for path, owner in _owners(replica):
        unchanged = copy.deepcopy(_changed(as_built.get(path, {}), _attributes(owner)))
        for name, value in (unchanged | originals.of(saved["attributes"][path])).items():
            vars(owner)[name] = put_into(vars(owner).get(name), value)
        for name, (kind, state) in saved["generators"][path].items():
            GENERATORS[_KINDS[kind]][1](vars(owner)[name], originals.of(state))
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
    """Has the module the buffers that the saved one had; a forward pass may have added, replaced or dropped some."""
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
    """Whether it can be written to, element by element: not where several are one in memory (`expand`)."""
    if (buffer.shape, buffer.dtype, buffer.layout) != (kept.shape, kept.dtype, kept.layout):
        return False
    if buffer.layout is not torch.strided:
        return True
    return all(stride for size, stride in zip(buffer.shape, buffer.stride(), strict=True) if size > 1)


def _key(key: Any, numbers: Mapping[Tensor, int]) -> tuple[str, Any]:
    """Of an entry of an optimizer's state: which parameter it is of, or what else it is kept under."""
    return (_PARAMETER, numbers[key]) if isinstance(key, Tensor) and key in numbers else (_OTHER, key)


def _state_of(
    key: tuple[str, Any], values: Any, parameters: Sequence[Tensor], groups: Mapping[Tensor, Mapping[str, Any]]
) -> tuple[Any, Any]:
    """What `_key` was given, and its values: with their parameter, should it be on a device and was on the CPU."""
    kind, of = key
    if kind == _OTHER:
        return of, values
    parameter = parameters[of]
    group = groups.get(parameter, {})
    # As Optimizer.load_state_dict has it: else 0-dim counts of steps are kept on the CPU.
    counts_too = group.get("fused") or group.get("capturable")

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.device) if tensor.dim() or counts_too else tensor

    return parameter, tree_map_only(Tensor, place, values)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a parameter group; functions and the like are as the config has them."""
    return {key: value for key, value in group.items() if key != "params" and is_portable(value)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that a state_dict leaves out included."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _modules(replica: Replica) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in ((_MODEL, replica.model), (_CRITERION, replica.criterion)):
        for path, module in root.named_modules():
            yield f"{prefix}.{path}" if path else prefix, module


def _optimizers(replica: Replica) -> list[tuple[str, torch.optim.Optimizer]]:
    """The replica's, and those that it wraps."""
    found = [(_OPTIMIZER, replica.optimizer)]
    for path, optimizer in found:
        for name, value in vars(optimizer).items():
            if isinstance(value, torch.optim.Optimizer) and all(value is not one for _, one in found):
                found.append((f"{path}.{name}", value))
    return found


def _owners(replica: Replica) -> Iterator[tuple[str, object]]:
    """What has plain state in its attributes."""
    yield from _modules(replica)
    yield from _optimizers(replica)


def _attributes(owner: object) -> dict[str, Any]:
    """What it keeps beside its tensors: its mode, a counter, a rate that a schedule changes."""
    return {name: value for name, value in vars(owner).items() if name not in _KEPT_ELSEWHERE and is_portable(value)}


def _changed(attributes: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not as they were; tensors and arrays always. As bytes: 0 is neither 0.0 nor -0.0."""
    return {
        name: value
        for name, value in attributes.items()
        if holds_arrays(value)
        or name not in before
        or (value is not before[name] and pickle.dumps(value) != pickle.dumps(before[name]))
    }


def _own_generators(owner: object) -> dict[str, tuple[str, Any]]:
    return {
        name: (kind, GENERATORS[cls][0](value))
        for name, value in vars(owner).items()
        for kind, cls in _KINDS.items()
        if type(value) is cls
    }


def _numbers(replica: Replica) -> dict[Tensor, int]:
    """Each parameter that an optimizer may have state of, and which one it is."""
    groups = [group for _, optimizer in _optimizers(replica) for group in optimizer.param_groups]
    parameters = dict.fromkeys(parameter for group in groups for parameter in group["params"])
    return {parameter: number for number, parameter in enumerate(parameters)}


def _others(replica: Replica) -> list[Any]:
    return [other for other in (replica.scheduler, replica.scaler) if other is not None]


def _hex(stage: Stage) -> dict[str, str]:
    return {name: digest.hex() for name, digest in stage.entries().items()}
