"""A replica's state as a checkpoint holds it: what is saved, and how it is put back and proved to be the same.

Unlike a snapshot, which is restored into the very objects it was taken of, it is restored into a replica that another
process has built.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.agreement.fingerprint import ALGORITHM
from dreplica.agreement.stages import Entry, Stage, make_stage, optimizer_entries, plain_name, rng_entries
from dreplica.replica.replica import Replica
from dreplica.replica.rng import get_rng_state, set_rng_state
from dreplica.training.checkpoint import CheckpointError, Contents, rng_from_json, rng_to_json
from dreplica.training.position import Position

_MODEL, _CRITERION = "model", "criterion"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)
_GENERATORS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "python": (random.Random, random.Random.getstate, random.Random.setstate),
    "torch": (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    "numpy": (
        numpy.random.Generator,
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
"""Of a module's own: type, and how the state is read and set."""


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
        on_cpu = _Copies(lambda tensor: tensor.cpu())
        digests = {stage: _hex(make_stage(on_cpu.of(entries))) for stage, entries in self.entries.items()}
        return Contents(on_cpu.of(self.tensors), on_cpu.of(self.optimizer), self.state | {"digests": digests})


def copy_state(replica: Replica, position: Position, run: Mapping[str, Any]) -> Copied:
    """Copies the state out of training's way.

    `run`: what else belongs into `state.json`, as JSON values.
    """
    numbers = _numbers(replica.optimizer)
    copies = _Copies(lambda tensor: tensor.detach().clone())
    optimizer = {
        "state": [(numbers[parameter], copies.of(state)) for parameter, state in replica.optimizer.state.items()],
        "groups": [copies.of({key: group[key] for key in group if key != "params"}) for group in _groups(replica)],
        "others": [copies.of(other.state_dict()) for other in _others(replica)],
        "criterion": copies.of(_tensors(replica.criterion)),
        "buffers": {
            path: {name: buffer is not None for name, buffer in module._buffers.items()}
            for path, module in _modules(replica)
        },
        "attributes": {path: copies.of(_attributes(module)) for path, module in _modules(replica)},
        "generators": {path: _own_generators(module) for path, module in _modules(replica)},
    }
    state = {
        "step": replica.steps_done,
        "position": position.as_dict(),
        **run,
        "rng": rng_to_json(get_rng_state()),
        "algorithm": ALGORITHM,
    }
    return Copied(copies.of(_tensors(replica.model)), optimizer, state, copies.of(_state_entries(replica)))


def restore_state(replica: Replica, contents: Contents) -> None:
    """Puts a saved state into a replica that was built as the saved one was; tensors of `contents` become part of it.

    Raises CheckpointError if it is another model's or optimizer's, or if anything does not come out with the digest it
    was saved with, naming the first such tensor; what is restored by then is not undone.
    """
    state = contents.state
    if state["algorithm"] != ALGORITHM:
        raise CheckpointError(f"its digests are of {state['algorithm']}, and here they are of {ALGORITHM}")
    _check_same_model(replica.model, contents.tensors)
    try:
        _put_back(replica, contents)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"it does not fit this replica: {type(error).__name__}: {error}") from error
    for stage, entries in _state_entries(replica).items():
        saved, now = state["digests"][stage], _hex(make_stage(entries))
        for name in [*saved, *now]:
            if saved.get(name) != now.get(name):
                raise CheckpointError(f"{name} of {stage} does not come out as it was saved")


def _state_entries(replica: Replica) -> dict[str, list[Entry]]:
    """All that lasts from step to step, stage by stage."""
    model = replica.model
    return {
        "buffers": [(plain_name(name), buffer) for name, buffer in model.named_buffers()],
        "optimizer": list(optimizer_entries(model, replica.optimizer, *_others(replica))),
        "weights": [(plain_name(name), parameter) for name, parameter in model.named_parameters()],
        "rng": rng_entries(),
    }


@torch.no_grad()
def _put_back(replica: Replica, contents: Contents) -> None:
    saved = contents.optimizer
    for path, module in _modules(replica):
        prefix, tensors = (_MODEL, contents.tensors) if path.startswith(_MODEL) else (_CRITERION, saved["criterion"])
        _restore_buffers(module, saved["buffers"][path], path.removeprefix(prefix).removeprefix("."), tensors)
        module.__dict__.update(saved["attributes"][path])
        for name, state in saved["generators"][path].items():
            _set_generator(getattr(module, name), state)
    for module, tensors in ((replica.model, contents.tensors), (replica.criterion, saved["criterion"])):
        for name, tensor in _tensors(module).items():
            tensor.copy_(tensors[name])
    for other, state in zip(_others(replica), saved["others"], strict=True):
        other.load_state_dict(state)
    for group, settings in zip(_groups(replica), saved["groups"], strict=True):
        group.update(settings)
    # Not load_state_dict, which casts the state to its parameter's dtype.
    parameters = list(_numbers(replica.optimizer))
    replica.optimizer.state = defaultdict(
        dict, {parameters[number]: _on_device(values, parameters[number]) for number, values in saved["state"]}
    )
    replica.steps_done = contents.state["step"]
    set_rng_state(rng_from_json(contents.state["rng"]))


def _check_same_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        there = tuple(tensors[name].shape) if name in tensors else None
        if there != tuple(parameter.shape):
            what = "has none" if there is None else f"has one of shape {there}"
            raise CheckpointError(f"it is of another model: {name} is {tuple(parameter.shape)} here, and it {what}")


def _restore_buffers(module: nn.Module, before: Mapping[str, bool], path: str, tensors: Mapping[str, Tensor]) -> None:
    """Has the module the buffers that the saved one had; a forward pass may have added, replaced or dropped some."""
    for name in [name for name in module._buffers if name not in before]:
        delattr(module, name)
    for name, was_tensor in before.items():
        now = module._buffers.get(name)
        kept = tensors.get(f"{path}.{name}" if path else name)
        if not was_tensor:
            module._buffers[name] = None
        elif kept is not None and (now is None or (now.shape, now.dtype) != (kept.shape, kept.dtype)):
            device = next((parameter.device for parameter in module.parameters()), kept.device)
            module._buffers[name] = kept.to(device)


def _on_device(values: Any, parameter: Tensor) -> Any:
    """State tensors where the optimizer has them: with their parameter, but for 0-dim step counts, which the ordinary
    optimizers keep on the CPU."""
    if not isinstance(values, Mapping):
        return values
    return {
        key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
        for key, value in values.items()
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that a state_dict leaves out included."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _modules(replica: Replica) -> Iterator[tuple[str, nn.Module]]:
    for prefix, root in ((_MODEL, replica.model), (_CRITERION, replica.criterion)):
        for path, module in root.named_modules():
            yield f"{prefix}.{path}" if path else prefix, module


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain values that the module keeps beside its tensors: its mode, a counter, a rate that a schedule changes."""
    return {
        name: value
        for name, value in vars(module).items()
        if (name == "training" or not name.startswith("_")) and _is_plain(value)
    }


def _own_generators(module: nn.Module) -> dict[str, tuple[str, Any]]:
    return {
        name: (kind, get_state(value))
        for name, value in vars(module).items()
        for kind, (cls, get_state, _) in _GENERATORS.items()
        if type(value) is cls
    }


def _set_generator(generator: Any, kept: tuple[str, Any]) -> None:
    kind, state = kept
    _GENERATORS[kind][2](generator, state)


def _is_plain(value: Any) -> bool:
    if isinstance(value, nn.Parameter):
        return False
    if type(value) in (list, tuple, set, dict):
        return all(map(_is_plain, [*value, *value.values()] if isinstance(value, dict) else value))
    return type(value) in _PLAIN


def _numbers(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """Each of its parameters, and which one it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: number for number, parameter in enumerate(parameters)}


def _groups(replica: Replica) -> list[dict[str, Any]]:
    return replica.optimizer.param_groups


def _others(replica: Replica) -> list[Any]:
    return [other for other in (replica.scheduler, replica.scaler) if other is not None]


def _hex(stage: Stage) -> dict[str, str]:
    return {name: digest.hex() for name, digest in stage.entries().items()}


class _Copies:
    """Deep copies that share what the originals share: a tensor that is met again has one copy."""

    def __init__(self, copy_tensor: Callable[[Tensor], Tensor]) -> None:
        self._copy_tensor = copy_tensor
        self._tensors: dict[Tensor, Tensor] = {}

    def of(self, value: Any) -> Any:
        """The copy of a value; of a tensor by `copy_tensor`."""
        if isinstance(value, Tensor):
            if value not in self._tensors:
                self._tensors[value] = self._copy_tensor(value)
            return self._tensors[value]
        if type(value) in (list, tuple, set):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        return copy.deepcopy(value)
