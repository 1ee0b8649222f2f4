"""How the stages of training state are taken from a model, an optimizer, a batch and the generators."""

import random
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.state.fingerprint.fingerprint import ABSENT, digest_bytes, digest_tensor, num_bytes
from dreplica.state.fingerprint.stage import STAGES, Stage

__all__ = [
    "STAGES",
    "Stage",
    "batch_stage",
    "buffers_stage",
    "gradients_stage",
    "optimizer_stage",
    "parameter_names",
    "rng_stage",
    "tensors_stage",
    "weights_stage",
]

_WRAPPED = "_orig_mod"

_FROZEN = " (requires_grad=False)"
"""Follows a parameter's name in the stage `gradients`: frozen on one replica only, it may show in nothing else."""

_NOT_STATE = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Of a parameter group: all but the first say how a step is computed, not what it depends on."""

Optimizers = torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None
"""One, several by name, or none."""

Entry = tuple[str, Tensor | bytes | None]
"""A name, and what is hashed under it; None: something that could be there and is not."""


def tensors_stage(tensors: Mapping[str, Tensor]) -> Stage:
    """Named tensors, in their order."""
    return make_stage(tensors.items())


def batch_stage(batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Stage:
    """A batch as it reaches the model: a tensor, or tensors in dicts, lists, tuples and dataclasses.

    NumPy arrays, numbers and strings count too. Raises TypeError for anything else, naming its place.
    """
    return make_stage(batch_entries(batch))


def weights_stage(model: nn.Module) -> Stage:
    """All parameters, in the order of their registration (tied ones once)."""
    return make_stage(named_weights(model).items())


def buffers_stage(model: nn.Module) -> Stage:
    """All buffers, those that are not saved included."""
    return make_stage(named_buffers(model).items())


def gradients_stage(model: nn.Module) -> Stage:
    """The gradients of all parameters, last layer first: the order in which the backward pass makes them.

    The name of one that requires none ends in ` (requires_grad=False)`.
    """
    return make_stage(gradient_entries(named_weights(model)))


def gradient_entries(named: dict[str, nn.Parameter]) -> Iterable[Entry]:
    """What `gradients_stage` hashes, of all parameters as `named_weights` names them."""
    return ((name + _FROZEN * (not each.requires_grad), each.grad) for name, each in reversed(named.items()))


def optimizer_stage(model: nn.Module, optimizer: Optimizers, *others: Any) -> Stage:
    """The optimizer's settings (lr, momentum, …) and its state per parameter; `others`: a scheduler, a GradScaler.

    Of several optimizers, names begin with the optimizer's own, unless the parameter's does: `head.group0.lr`.
    Parameters that are not the model's (`group0.params.3`: a loss's own, say) are compared here with their values,
    since no other stage holds them. Functions count by name and other objects by type, because their `repr` may hold
    an address. Which parameters a group holds is not hashed by itself: one that is missing on a replica shows in the
    state kept for it, or, of an optimizer that keeps none, in the weights after the step; `check_wiring` names it.
    """
    return make_stage(optimizer_entries(named_weights(model), optimizer, *others))


def by_name(optimizer: Optimizers) -> dict[str, torch.optim.Optimizer]:
    """Several optimizers, or the only one under the name "" (none: an empty dict)."""
    if optimizer is None:
        return {}
    return dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer, own_name: str = "") -> dict[Tensor, str]:
    """Every parameter of either, and the name under which `optimizer_stage` has its state.

    `own_name`: the optimizer's among several.
    """
    return _names(named_weights(model), optimizer, own_name)


def _names(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, own_name: str) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: _prefixed(own_name, name) for name, parameter in named.items()}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            names.setdefault(parameter, _prefixed(own_name, f"group{index}.params.{position}"))
    return names


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters under the names that stages and verdicts give them."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """All buffers, likewise."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def plain_name(path: str) -> str:
    """The name of a module, parameter or buffer where no module is wrapped by `torch.compile`."""
    return ".".join(part for part in path.split(".") if part != _WRAPPED) if _WRAPPED in path else path


def rng_stage() -> Stage:
    """The global generators of Python, NumPy, torch on the CPU and, once CUDA is in use, torch on this GPU."""
    return make_stage(rng_entries())


def rng_entries() -> list[Entry]:
    """What `rng_stage` hashes."""
    entries: list[Entry] = [
        ("python", _python_state()),
        ("numpy", _numpy_state()),
        ("torch.cpu", torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():
        entries.append(("torch.cuda", torch.cuda.get_rng_state()))
    return entries


def make_stage(entries: Iterable[Entry]) -> Stage:
    """Hashes the entries, on the CPU."""
    digests: dict[str, bytes] = {}
    total = 0
    for name, value in with_distinct_names(entries):
        digests[name] = digest_entry(name, value)
        total += num_bytes(value) if isinstance(value, Tensor) else 0
    return Stage(tuple(digests), b"".join(digests.values()), total)


def digest_entry(name: str, value: Tensor | bytes | None) -> bytes:
    """16 bytes over one entry, computed on the CPU."""
    if isinstance(value, Tensor):
        return digest_tensor(name, value)
    return ABSENT if value is None else digest_bytes(name, value)


def with_distinct_names(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries; two schedulers of one class, say, do not hide each other: `StepLR.last_epoch#2`."""
    taken: set[str] = set()
    for given, value in entries:
        name = given if given not in taken else _unused(given, taken)
        taken.add(name)
        yield name, value


def _unused(name: str, taken: Container[str]) -> str:
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"


def optimizer_entries(named: Mapping[str, nn.Parameter], optimizers: Optimizers, *others: Any) -> Iterable[Entry]:
    """What `optimizer_stage` hashes, with all parameters as `named_weights` names them."""
    own = set(map(id, named.values()))
    for own_name, optimizer in by_name(optimizers).items():
        names = _names(named, optimizer, own_name)
        for index, group in enumerate(optimizer.param_groups):
            settings = {key: value for key, value in group.items() if key not in _NOT_STATE}
            yield from _leaves(_prefixed(own_name, f"group{index}"), settings)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in held:
            if id(parameter) not in own:
                yield names[parameter], parameter
            yield from _leaves(names[parameter], optimizer.state.get(parameter, {}))
        visited = set(map(id, held))
        for number, (key, state) in enumerate(optimizer.state.items()):
            if id(key) not in visited:
                yield from _leaves(_prefixed(own_name, f"state.{key if isinstance(key, str) else number}"), state)
    for other in others:
        if other is not None:
            yield from _leaves(type(other).__name__, _state_of(other))


def _state_of(other: Any) -> Mapping[str, Any]:
    """Its `state_dict`; of a GradScaler the tensors in it, since to read those off a GPU is to wait for it."""
    if not isinstance(other, torch.amp.GradScaler) or not other.is_enabled():
        return other.state_dict()
    scale, tracker = other._scale, other._growth_tracker
    if scale is None or tracker is None:  # until it is first used, or after a resume: the same in numbers
        state = other.state_dict()
        scale = torch.tensor(state["scale"], dtype=torch.float32, device="cpu")
        tracker = torch.tensor(state["_growth_tracker"], dtype=torch.int32, device="cpu")
    settings = ("growth_factor", "backoff_factor", "growth_interval")
    return {
        "scale": scale,
        **{name: getattr(other, f"get_{name}")() for name in settings},
        "_growth_tracker": tracker,
    }


def _prefixed(own_name: str, name: str) -> str:
    return name if not own_name or name.startswith(f"{own_name}.") else f"{own_name}.{name}"


def _leaves(name: str, value: Any) -> Iterable[tuple[str, Tensor | bytes]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}.{index}", item)
    elif _is_plain(value):
        yield name, _plain_bytes(value)
    else:
        named = value if hasattr(value, "__qualname__") else type(value)
        yield name, f"{named.__module__}.{named.__qualname__}".encode()


def batch_entries(batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Iterable[Entry]:
    """What `batch_stage` hashes."""
    return _batch_entries("", batch)


def _batch_entries(name: str, value: Any) -> Iterable[tuple[str, Tensor | bytes]]:
    if isinstance(value, Tensor):
        yield name or "inputs", value
    elif isinstance(value, Mapping | list | tuple):
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        if not name and isinstance(value, list | tuple) and _is_pair(value):
            pairs = zip(("inputs", "labels"), value, strict=True)
        for key, item in pairs:
            yield from _batch_entries(f"{name}.{key}" if name else str(key), item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _batch_entries(name, {field.name: getattr(value, field.name) for field in fields(value)})
    elif _is_plain(value):
        yield name or "inputs", _plain_bytes(value)
    else:
        raise TypeError(
            f"cannot compare the {type(value).__name__} at {name or 'the top'!r}; pass tensors in dicts, lists, tuples "
            "or dataclasses, or leave its stage out: stages=(...)"
        )


def _is_pair(value: Sequence[Any]) -> bool:
    """Of inputs and labels, rather than of two micro-batches, each of which is such a pair."""
    return len(value) == 2 and not all(isinstance(item, list | tuple) for item in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, numpy.ndarray | numpy.generic):
        return not value.dtype.hasobject
    return isinstance(value, int | float | complex | str | bytes | torch.dtype | None)


def _plain_bytes(value: Any) -> bytes:
    if isinstance(value, numpy.ndarray | numpy.generic):
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return repr(value).encode()  # exact for a float


def _python_state() -> bytes:
    version, internal, gauss_next = random.getstate()
    return struct.pack(f"<{len(internal)}I", *internal) + repr((version, gauss_next)).encode()


def _numpy_state() -> bytes:
    name, keys, *rest = numpy.random.get_state()
    return numpy.asarray(keys).tobytes() + repr((name, *rest)).encode()
