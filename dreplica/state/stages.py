"""Construction of the stages of training state from a model, an optimizer, a batch and the generators.

The names of entries and their order are hashed, so changing either changes every digest and every recorded trace.
"""

import random
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.state.fingerprint.fingerprint import UnhashableError, digest_bytes, digest_tensor, num_bytes
from dreplica.state.fingerprint.stage import ABSENT, STAGES, Stage

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
"""Suffix of a frozen parameter's name in the stage `gradients`. Freezing it on one replica may change nothing else."""

_NOT_STATE = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Keys of a parameter group that are not compared: the parameters, and how (not from what) a step is computed."""

Optimizers = torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None
"""One optimizer, several by name, or None."""

Entry = tuple[str, Tensor | bytes | None]
"""A name and the value hashed under it. None is a value that could exist but does not, such as a missing gradient."""


def tensors_stage(tensors: Mapping[str, Tensor]) -> Stage:
    """Hash named tensors, in their order."""
    return make_stage(tensors.items())


def batch_stage(batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Stage:
    """Hash a batch: a tensor, or tensors in dicts, lists, tuples and dataclasses.

    NumPy arrays, numbers and strings are hashed, too.

    Raises:
        UnhashableError: If the batch contains anything else. The message names the place.
    """
    return make_stage(batch_entries(batch))


def weights_stage(model: nn.Module) -> Stage:
    """Hash all parameters in the order of their registration (tied ones once)."""
    return make_stage(named_weights(model).items())


def buffers_stage(model: nn.Module) -> Stage:
    """Hash all buffers, including those that are not in the `state_dict`."""
    return make_stage(named_buffers(model).items())


def gradients_stage(model: nn.Module) -> Stage:
    """Hash the gradients of all parameters, last layer first, in the order of the backward pass.

    The name of a frozen parameter ends in ` (requires_grad=False)`.
    """
    return make_stage(gradient_entries(named_weights(model)))


def gradient_entries(named: dict[str, nn.Parameter]) -> Iterable[Entry]:
    """Return the entries of `gradients_stage` for the parameters that `named_weights` returns."""
    return ((name + _FROZEN * (not each.requires_grad), each.grad) for name, each in reversed(named.items()))


def optimizer_stage(model: nn.Module, optimizer: Optimizers, *others: Any) -> Stage:
    """Hash the optimizer's settings (lr, momentum, …) and its state of each parameter.

    With several optimizers, names begin with the optimizer's name, unless the parameter's name does: `head.group0.lr`.
    Parameters outside the model (`group0.params.3`, those of a loss) are compared here with their values, since no
    other stage contains them. Functions are hashed by name and other objects by type, because their `repr` may contain
    an address. The list of a group's parameters is not hashed. A parameter missing on one replica shows in the state
    kept for it or, if the optimizer keeps none, in the weights after the step; `check_wiring` names it.

    Args:
        model: The model.
        optimizer: One optimizer, several by name, or None.
        *others: Further objects with a `state_dict`: a scheduler, a GradScaler.
    """
    return make_stage(optimizer_entries(named_weights(model), optimizer, *others))


def by_name(optimizer: Optimizers) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers by name, a single one under the name ""."""
    if optimizer is None:
        return {}
    return dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer, own_name: str = "") -> dict[Tensor, str]:
    """Return the parameters of the model and the optimizer with their names in `optimizer_stage`.

    Args:
        model: The model.
        optimizer: One optimizer.
        own_name: The optimizer's name, if there are several.

    Returns:
        Parameter to name.
    """
    return _names(named_weights(model), optimizer, own_name)


def _names(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, own_name: str) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: _prefixed(own_name, name) for name, parameter in named.items()}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            names.setdefault(parameter, _prefixed(own_name, f"group{index}.params.{position}"))
    return names


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters under the names that stages and verdicts use."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return all buffers under the names that stages and verdicts use."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def plain_name(path: str) -> str:
    """Return a dotted name without the parts that `torch.compile` adds."""
    return ".".join(part for part in path.split(".") if part != _WRAPPED) if _WRAPPED in path else path


def rng_stage() -> Stage:
    """Hash the global generators of Python, NumPy, torch on the CPU and, once CUDA is in use, on this GPU."""
    return make_stage(rng_entries())


def rng_entries() -> list[Entry]:
    """Return the entries of `rng_stage`."""
    entries: list[Entry] = [
        ("python", _python_state()),
        ("numpy", _numpy_state()),
        ("torch.cpu", torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():
        entries.append(("torch.cuda", torch.cuda.get_rng_state()))
    return entries


def make_stage(entries: Iterable[Entry]) -> Stage:
    """Hash the entries on the CPU."""
    digests: dict[str, bytes] = {}
    total = 0
    for name, value in with_distinct_names(entries):
        digests[name] = digest_entry(name, value)
        total += num_bytes(value) if isinstance(value, Tensor) else 0
    return Stage(tuple(digests), b"".join(digests.values()), total)


def digest_entry(name: str, value: Tensor | bytes | None) -> bytes:
    """Return the digest of one entry (16 bytes), computed on the CPU."""
    if isinstance(value, Tensor):
        return digest_tensor(name, value)
    return ABSENT if value is None else digest_bytes(name, value)


def with_distinct_names(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries with numbered names where they repeat: `StepLR.last_epoch#2`."""
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
    """Return the entries of `optimizer_stage`.

    Args:
        named: The model's parameters, as `named_weights` returns them.
        optimizers: One optimizer, several by name, or None.
        *others: Further objects with a `state_dict`.
    """
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
    """Return the object's `state_dict`.

    For a GradScaler, return its tensors instead: its `state_dict` reads them from the GPU, which waits for the GPU.
    """
    if not isinstance(other, torch.amp.GradScaler) or not other.is_enabled():
        return other.state_dict()
    scale, tracker = other._scale, other._growth_tracker
    if scale is None or tracker is None:  # before its first use or after a resume: the same values
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
    """Return the entries of `batch_stage`."""
    return _batch_entries("", batch)


def prediction_entries(predictions: Tensor | Mapping[str, Any] | Sequence[Any]) -> Iterable[Entry]:
    """Return the entries of the stage `predictions`, with the name `predictions` for a single tensor."""
    return batch_entries({"predictions": predictions} if isinstance(predictions, Tensor) else predictions)


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
        raise UnhashableError(
            f"cannot compare the {type(value).__name__} at {name or 'the top'!r}: expected tensors in dicts, lists, "
            "tuples or dataclasses. Convert it, or exclude its stage with stages=(...).",
            name=name,
        )


def _is_pair(value: Sequence[Any]) -> bool:
    """Return True for a pair of inputs and labels, False for two micro-batches, which are pairs themselves."""
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
