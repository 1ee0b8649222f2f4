"""Enumeration of everything that makes up the state of a replica.

Snapshots, checkpoints and shared state all take their pieces from `StateWalk`, so that none of them can miss a piece
that another one handles. They differ in what they do with it: a snapshot restores the very objects it was taken from,
a checkpoint restores a replica that another process has built.

Besides what is enumerated here, a replica's state consists of its number of steps and the global generators
(`state/rng.py`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.state.plain_state import DICT_TYPES, GENERATORS, SKIPPED_TYPES
from dreplica.state.replica import Parts
from dreplica.state.stages import named_buffers, named_weights, parameter_names

MODEL, CRITERION, OPTIMIZER = "model", "criterion", "optimizer"

_ENTERED = DICT_TYPES | {list, tuple, deque}
"""Containers searched for objects with state. Sets are not: their order differs between processes."""

_Path = tuple["_Path", str | int] | None
"""Path of the container, and the key in it; None for an owner's attributes."""


class StateWalk:
    """The pieces of one replica's state, each under a path that is the same in every process that builds it alike.

    The pieces are listed when the walk is created: create a new one after the replica has been changed.

    Args:
        parts: The replica.

    Attributes:
        roots: Model and criterion, by path.
        modules: Every module of both, by path: `model`, `model.head`, `criterion`.
        optimizers: The optimizers, by path, and those held in attributes of modules or of other optimizers, also
            within dicts, lists and tuples: `optimizer`, `optimizer.base`, `optimizer.parts.0`.
        others: Objects with a `state_dict`: scheduler and scaler.
    """

    def __init__(self, parts: Parts) -> None:
        self.roots: dict[str, nn.Module] = {MODEL: parts.model, CRITERION: parts.criterion}
        self.modules: dict[str, nn.Module] = {
            f"{root}.{path}" if path else root: module
            for root, top in self.roots.items()
            for path, module in top.named_modules()
        }
        self.others = list(parts.others)
        self._own_optimizers = dict(parts.optimizers)
        self.optimizers = self._find_optimizers()

    @property
    def owners(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Objects whose attributes are state, by path: modules, then optimizers."""
        return {**self.modules, **self.optimizers}

    @property
    def scalers(self) -> list[torch.amp.GradScaler]:
        """Gradient scalers among `others`, whose `state_dict` synchronizes with the device."""
        return [other for other in self.others if isinstance(other, torch.amp.GradScaler)]

    @property
    def state_objects(self) -> list[object]:
        """Objects that an optimizer keeps as a parameter's state, such as a preconditioner."""
        return [
            value
            for optimizer in self.optimizers.values()
            for _, state in _mappings(optimizer)
            for value in state.values()
            if not isinstance(value, Tensor)
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters of model and criterion, named `model.head.bias`."""
        return {
            f"{root}.{name}": parameter
            for root, top in self.roots.items()
            for name, parameter in named_weights(top).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters, buffers and the optimizers' state tensors by name.

        Returns:
            Tensors named `model.head.bias`, `criterion.weight`, `optimizer.head.bias.momentum_buffer`. Names are the
            ones that stages use: without the wrapper that `torch.compile` adds.
        """
        named: dict[str, Tensor] = {}
        for root, top in self.roots.items():
            named |= {f"{root}.{name}": tensor for name, tensor in named_weights(top).items()}
            named |= {f"{root}.{name}": tensor for name, tensor in named_buffers(top).items()}
        for own_name, optimizer in self._own_optimizers.items():
            names = parameter_names(self.roots[MODEL], optimizer, own_name)
            for parameter, state in _mappings(optimizer):
                named |= {
                    f"{OPTIMIZER}.{names.get(parameter)}.{key}": value
                    for key, value in state.items()
                    if isinstance(value, Tensor)
                }
        return named

    def _find_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        own = self._own_optimizers.items()
        found = {f"{OPTIMIZER}.{name}" if name else OPTIMIZER: optimizer for name, optimizer in own}
        seen = set(map(id, found.values()))
        # Optimizers before modules: a checkpoint numbers parameters in this order.
        pending: deque[tuple[str, object]] = deque([*found.items(), *self.modules.items()])
        while pending:
            path, owner = pending.popleft()
            for name, optimizer in _find(owner, _is_optimizer):
                if id(optimizer) not in seen:
                    seen.add(id(optimizer))
                    found[f"{path}.{name}"] = optimizer
                    pending.append((f"{path}.{name}", optimizer))
        return found


def generators_of(owner: object) -> dict[str, Any]:
    """Return the random generators that an owner holds, by attribute: `noise`, or `noises.0` within a container."""
    return dict(_find(owner, lambda value: type(value) in GENERATORS))


def _find(owner: object, wanted: Callable[[object], bool]) -> Iterator[tuple[str, Any]]:
    """Yield the wanted objects in an owner's attributes, searching containers breadth first."""
    seen: set[int] = set()
    pending: deque[tuple[_Path, Any]] = deque([(None, getattr(owner, "__dict__", None))])
    while pending:
        path, value = pending.popleft()
        if wanted(value):
            yield _render(path), value
        if type(value) not in _ENTERED or id(value) in seen:
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for position, (key, child) in enumerate(items):
            if type(child) not in SKIPPED_TYPES:
                # A key that is not a string may be a tensor, which has no name.
                pending.append(((path, key if isinstance(key, str) else position), child))


def _render(path: _Path) -> str:
    keys = []
    while path is not None:
        path, key = path
        keys.append(str(key))
    return ".".join(reversed(keys))


def _mappings(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    """Yield each parameter and its state. State of another form is part of the optimizer's attributes."""
    return ((key, state) for key, state in optimizer.state.items() if isinstance(state, Mapping))


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer)
