"""The replica's own values besides tensors: generators, settings, modes, attributes, gradients.

Any of them may be the cause of a divergence. So a replay begins with each replica's own, and each that differs is then
made equal to see whether the divergence is gone.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.agreement.values import spell_values
from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint.fingerprint import digest_bytes
from dreplica.state.nested import leaves_of, replaced
from dreplica.state.plain_state import GENERATORS
from dreplica.state.replica import Parts
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.stages import digest_entry, make_stage, named_weights
from dreplica.state.walk import MODEL, OPTIMIZER, StateWalk, generators_of

_ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module())) | {"training"}
_SETTINGS_OF_TORCH = frozenset({"params"})
_LONGEST_SEQUENCE = 100
"""Longest list or tuple of plain values that counts as one value."""
_LONGEST_TEXT = 60
"""Longest text of a value, in characters."""
_PLAIN = bool | int | float | complex | str | bytes | torch.dtype | numpy.generic | None
"""Types of values that are compared by their `repr`."""
_GLOBAL = {
    "python": "Python's random",
    "numpy": "NumPy's global generator",
    "torch": "torch's generator",
    "cuda": "torch's CUDA generator",
}
"""Names of `get_rng_state` to names in words."""


class Section(StrEnum):
    """Kinds of a replica's own values, in the order in which they are doubted: the least telling first."""

    GRADIENTS = "gradients"
    """Gradients that were there before the step."""
    ATTRIBUTES = "attributes"
    """Plain attributes of modules."""
    GENERATORS = "generators"
    """The global generators, and those that modules and optimizers hold."""
    MODES = "modes"
    """Training or evaluation mode of modules, and `requires_grad` of parameters."""
    SETTINGS = "settings"
    """Settings of optimizers, and the values of schedulers, scalers and other objects."""


@dataclass(frozen=True)
class OwnValue:
    """One value of this replica, which can be replaced by another replica's."""

    section: Section
    """The kind of value."""
    name: str
    """The value's name, such as `group0.lr`."""
    value: Any
    """The value in the form that is sent to other replicas. None for gradients, which are cleared."""
    digest: bytes
    """Digest of the value."""
    text: str
    """The value in words. Empty where it is too long."""
    write: Callable[[Any], None]
    """Replaces the value."""


@dataclass(frozen=True)
class DifferingValue:
    """A value that differs between replicas."""

    section: Section
    """The kind of value."""
    name: str
    """The value's name, such as `group0.lr`."""
    texts: Sequence[str]
    """The value on each replica, in words; empty where it is too long."""
    shared: Any = field(repr=False)
    """The value that all replicas get where it is made equal."""

    @property
    def is_global_generator(self) -> bool:
        """True for a generator of the stage `rng`."""
        return self.section is Section.GENERATORS and self.name in _GLOBAL.values()

    def __str__(self) -> str:
        return f"{self.name} {spell_values(self.texts)}" if all(self.texts) else self.name


def find_differing_values(parts: Parts, source: int, channel: Channel) -> list[DifferingValue]:
    """Return the values that differ between replicas, with those of one replica to make them equal.

    Args:
        parts: The state of this replica.
        source: The replica whose values are shared.
        channel: The control channel between all replicas.

    Note:
        Collective: call on every rank.

    Raises:
        AttemptFailed: Some replica's values cannot be read. It is raised on all replicas.
    """
    own = attempt(channel, lambda: {(each.section, each.name): each for each in own_values(parts)})
    rows = channel.gather({key: (each.digest, each.text) for key, each in own.items()})
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    keys = [key for key in keys if len({row[key][0] for row in rows}) > 1]
    shared = channel.gather([own[key].value for key in keys] if channel.rank == source else None)[source]
    return [
        DifferingValue(key[0], key[1], [row[key][1] for row in rows], value)
        for key, value in zip(keys, shared, strict=True)
    ]


def write_values(parts: Parts, values: Sequence[DifferingValue]) -> list[Callable[[], None]]:
    """Replace values of this replica by those that are shared.

    Returns:
        Functions that write the replica's own values again, since a snapshot does not have all of them.
    """
    own = {(each.section, each.name): each for each in own_values(parts)} if values else {}
    undo: list[Callable[[], None]] = []
    for each in values:
        mine = own[each.section, each.name]
        mine.write(each.shared)
        if each.section is not Section.GRADIENTS:
            undo.append(partial(mine.write, mine.value))
    return undo


def own_values(parts: Parts) -> Iterator[OwnValue]:
    """Yield the values of this replica, with names that are the same on every replica."""
    walk = StateWalk(parts)
    yield from _gradients(parts)
    yield from _generators(walk)
    for path, module in walk.modules.items():
        name = path.removeprefix(MODEL).removeprefix(".")
        yield _plain(Section.MODES, name or "the model", module.training, partial(_set_mode, module), _mode_text)
        yield from _attributes(Section.ATTRIBUTES, f"{name}." if name else "", module, _ATTRIBUTES_OF_TORCH)
    for name, parameter in named_weights(parts.model).items():
        write = parameter.requires_grad_
        yield _plain(Section.MODES, f"{name}.requires_grad", parameter.requires_grad, write)
    for path, optimizer in walk.optimizers.items():
        name = path.removeprefix(OPTIMIZER).removeprefix(".")
        prefix = f"{name}." if name else ""
        for index, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in _SETTINGS_OF_TORCH and _is_plain(value):
                    yield _plain(Section.SETTINGS, f"{prefix}group{index}.{key}", value, partial(_set_item, group, key))
        yield from _attributes(Section.SETTINGS, f"{prefix}optimizer.", optimizer, frozenset())
    taken: dict[str, int] = {}
    for other in walk.others:
        kind = type(other).__name__
        taken[kind] = taken.get(kind, 0) + 1
        yield from _of_other(kind if taken[kind] == 1 else f"{kind}#{taken[kind]}", other)


def _gradients(parts: Parts) -> Iterator[OwnValue]:
    named = named_weights(parts.model)
    digest = make_stage((name, each.grad) for name, each in named.items()).digest
    yield OwnValue(Section.GRADIENTS, "gradients", None, digest, "", partial(_clear_gradients, named))


def _clear_gradients(named: Mapping[str, nn.Parameter], _: Any) -> None:
    for parameter in named.values():
        parameter.grad = None


def _generators(walk: StateWalk) -> Iterator[OwnValue]:
    for name, state in get_rng_state().items():
        yield OwnValue(Section.GENERATORS, _GLOBAL[name], state, _digest(state), "", partial(_set_global, name))
    for path, owner in walk.owners.items():
        for attribute, generator in generators_of(owner).items():
            get, put = GENERATORS[type(generator)]
            state, name = get(generator), f"{path}.{attribute}".removeprefix(f"{MODEL}.")
            yield OwnValue(Section.GENERATORS, name, state, _digest(state), "", partial(put, generator))


def _set_global(name: str, state: Any) -> None:
    set_rng_state(get_rng_state() | {name: state})


def _of_other(kind: str, other: Any) -> Iterator[OwnValue]:
    """Yield the plain values of a scheduler, a scaler or another object with a `state_dict`."""
    state = other.state_dict()
    for path, value in leaves_of(state):
        if _is_plain(value):
            name = ".".join(map(str, (kind, *path)))
            yield _plain(Section.SETTINGS, name, value, partial(_set_in_state, other, path))
    for name, value in getattr(other, "__dict__", {}).items():
        if name.lstrip("_") not in state and name not in {*state, *_ATTRIBUTES_OF_TORCH} and _is_plain(value):
            yield _plain(Section.SETTINGS, f"{kind}.{name}", value, partial(setattr, other, name))


def _set_in_state(other: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set a value in an object's `state_dict`, and load it."""
    other.load_state_dict(replaced(other.state_dict(), path, value))


def _attributes(section: Section, prefix: str, owner: object, left_out: frozenset[str]) -> Iterator[OwnValue]:
    for name, value in vars(owner).items():
        if name not in left_out and _is_plain(value):
            yield _plain(section, prefix + name, value, partial(setattr, owner, name))


def _plain(
    section: Section,
    name: str,
    value: Any,
    write: Callable[[Any], Any],
    spell: Callable[[Any], str] | None = None,
) -> OwnValue:
    if isinstance(value, Tensor):
        kept = value.detach().to("cpu", copy=True)
        return OwnValue(section, name, kept, digest_entry("", kept), _short(kept.item()), partial(_copy_to, value))
    text = _short(value) if spell is None else spell(value)
    return OwnValue(section, name, value, repr(value).encode(), text, write)


def _copy_to(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else ""


def _mode_text(training: bool) -> str:
    return "training mode" if training else "evaluation mode"


def _set_mode(module: nn.Module, training: bool) -> None:
    module.training = training


def _set_item(group: dict[str, Any], key: str, value: Any) -> None:
    group[key] = value


def _is_plain(value: Any) -> bool:
    """Return True for numbers, strings, tensors of one number, and short lists and tuples of numbers and strings."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() == 1 and not value.is_meta and not value.requires_grad
    if type(value) in (list, tuple):
        return len(value) <= _LONGEST_SEQUENCE and all(
            _is_plain(item) and not isinstance(item, Tensor) for item in value
        )
    return isinstance(value, _PLAIN)


def _digest(state: Any) -> bytes:
    if isinstance(state, Tensor):
        return digest_entry("", state)
    if isinstance(state, tuple) and isinstance(state[0], str):  # of NumPy's global generator
        return b"".join(digest_bytes("", numpy.asarray(part).tobytes()) for part in state[1:])
    return digest_bytes("", pickle.dumps(state))
