"""What makes up training state, stage by stage, and each part's digest.

A stage is a list of entries (name, 16-byte digest) in causal order: the first entry that differs between replicas is
the one to report.
"""

import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor, nn

from dreplica.agreement.fingerprint import ABSENT, digest_bytes, digest_tensor

STAGES = ("indices", "batch", "buffers", "output", "gradients", "optimizer", "weights", "rng", "predictions")
"""In the causal order within a step: of several that differ, the first is the one to report."""


@dataclass(frozen=True)
class Stage:
    """The digests of one stage on one replica."""

    names: tuple[str, ...]
    digests: bytes
    """16 bytes for each name, in order."""

    @property
    def digest(self) -> bytes:
        """16 bytes over all names and digests."""
        return xxhash.xxh3_128_digest(b"\0".join(name.encode() for name in self.names) + b"\1" + self.digests)

    def entries(self) -> dict[str, bytes]:
        """Name to digest, in causal order."""
        return {name: self.digests[16 * i : 16 * i + 16] for i, name in enumerate(self.names)}


def _stage(entries: Iterable[tuple[str, bytes]]) -> Stage:
    pairs = list(entries)
    return Stage(tuple(name for name, _ in pairs), b"".join(digest for _, digest in pairs))


def tensors_stage(tensors: Mapping[str, Tensor]) -> Stage:
    """Named tensors, in their order."""
    return _stage((name, digest_tensor(name, tensor)) for name, tensor in tensors.items())


def batch_stage(batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Stage:
    """A batch as it reaches the model: a tensor, or tensors in dicts, lists and tuples. Raises TypeError otherwise."""
    return tensors_stage(_named(batch, ""))


def weights_stage(model: nn.Module) -> Stage:
    """All parameters, in the order of their registration (tied ones once)."""
    return tensors_stage(dict(model.named_parameters()))


def buffers_stage(model: nn.Module) -> Stage:
    """All buffers, those that are not saved included."""
    return tensors_stage(dict(model.named_buffers()))


def gradients_stage(model: nn.Module) -> Stage:
    """The gradients of all parameters, last layer first: the order in which the backward pass makes them."""
    return _stage(
        (name, ABSENT if parameter.grad is None else digest_tensor(name, parameter.grad))
        for name, parameter in reversed(list(model.named_parameters()))
    )


def optimizer_stage(model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> Stage:
    """The optimizer's settings (lr, momentum, …) and its state per parameter; `others`: a scheduler, a GradScaler."""
    return _stage(_optimizer_entries(model, optimizer, others))


def rng_stage() -> Stage:
    """The global generators of Python, NumPy, torch on the CPU and, once CUDA is in use, torch on this GPU."""
    entries = [
        ("python", digest_bytes("python", _python_state())),
        ("numpy", digest_bytes("numpy", _numpy_state())),
        ("torch.cpu", digest_tensor("torch.cpu", torch.get_rng_state())),
    ]
    if torch.cuda.is_initialized():
        entries.append(("torch.cuda", digest_tensor("torch.cuda", torch.cuda.get_rng_state())))
    return _stage(entries)


def _optimizer_entries(
    model: nn.Module, optimizer: torch.optim.Optimizer, others: tuple[Any, ...]
) -> Iterable[tuple[str, bytes]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        yield from _leaves(f"group{index}", {key: value for key, value in group.items() if key != "params"})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), f"unnamed{tuple(parameter.shape)}")
            yield from _leaves(name, optimizer.state.get(parameter, {}))
    for other in others:
        if other is not None:
            yield from _leaves(type(other).__name__, other.state_dict())


def _leaves(name: str, value: Any) -> Iterable[tuple[str, bytes]]:
    if isinstance(value, Tensor):
        yield name, digest_tensor(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}.{index}", item)
    elif isinstance(value, int | float | complex | str | bytes | None):
        yield name, digest_bytes(name, repr(value).encode())  # repr of a float is exact
    else:  # a function or object: its repr may hold an address, so only its type counts
        yield name, digest_bytes(name, f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _named(value: Any, prefix: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix or "inputs": value}
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        pairs = zip(("inputs", "labels"), value, strict=True) if len(value) == 2 and not prefix else enumerate(value)
    else:
        raise TypeError(
            f"batch: expected tensors in dicts, lists or tuples, found {type(value).__name__} at {prefix!r}"
        )
    tensors: dict[str, Tensor] = {}
    for key, item in pairs:
        if item is not None:
            tensors |= _named(item, f"{prefix}.{key}" if prefix else str(key))
    return tensors


def _python_state() -> bytes:
    version, internal, gauss_next = random.getstate()
    return struct.pack(f"<{len(internal)}I", *internal) + repr((version, gauss_next)).encode()


def _numpy_state() -> bytes:
    name, keys, *rest = numpy.random.get_state()
    return numpy.asarray(keys).tobytes() + repr((name, *rest)).encode()
