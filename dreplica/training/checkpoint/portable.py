"""Conversion of plain attributes to a form that can be loaded without executing code, and back.

`torch.load(weights_only=True)` knows tensors, numbers, strings, lists, tuples, sets and dicts. Anything else is stored
as a tagged dict.
"""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

_VALUES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, Tensor})
_DICTS = frozenset({dict, OrderedDict, defaultdict, Counter})
_SEQUENCES = frozenset({list, tuple, set, frozenset, deque})
_TAG = "dreplica.portable"
"""Key that marks a dict as the stored form of another type."""


def is_portable(value: Any) -> bool:
    """Return True for numbers, strings, tensors and arrays, in standard containers. Parameters are not portable."""
    kind = type(value)
    if kind in _DICTS:
        return all(is_portable(key) and is_portable(item) for key, item in value.items())
    if kind in _SEQUENCES:
        return all(map(is_portable, value))
    return kind in _VALUES or _is_array(value)


def holds_arrays(value: Any) -> bool:
    """Return True if a value is or contains a tensor or an array."""
    if isinstance(value, Mapping):
        return any(map(holds_arrays, value.values()))
    if type(value) in _SEQUENCES:
        return any(map(holds_arrays, value))
    return isinstance(value, Tensor) or _is_array(value)


class Portable:
    """Converter to portable copies.

    Copies share tensors as the originals do: a tensor that occurs twice is copied once.

    Args:
        copy_tensor: Copies a tensor.
    """

    def __init__(self, copy_tensor: Callable[[Tensor], Tensor]) -> None:
        self._copy_tensor = copy_tensor
        self._tensors: dict[Tensor, Tensor] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor."""
        if tensor not in self._tensors:
            self._tensors[tensor] = self._copy_tensor(tensor)
        return self._tensors[tensor]

    def of(self, value: Any) -> Any:
        """Return the portable copy of a value. Unsupported types are copied unchanged."""
        if isinstance(value, Tensor):
            own = self.tensor(value)
            return own if value.device.type == "cpu" else {_TAG: "on_device", "tensor": own}
        if isinstance(value, dict):
            return {self.of(key): self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, deque):
            return {_TAG: "deque", "items": [self.of(item) for item in value], "maxlen": value.maxlen}
        if type(value) is frozenset:
            return {_TAG: "frozenset", "items": [self.of(item) for item in value]}
        if _is_array(value):
            shape = value.shape if isinstance(value, numpy.ndarray) else None
            return {_TAG: "numpy", "dtype": value.dtype.str, "shape": shape, "bytes": value.tobytes()}
        return copy.deepcopy(value)


class Originals:
    """Converter from portable copies back to values. Subclasses of dict become plain dicts.

    Args:
        device: Device of the tensors that were not on the CPU when they were copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[Tensor, Tensor] = {}

    def of(self, value: Any) -> Any:
        """Return the value that was given to `Portable.of`."""
        if isinstance(value, dict) and _TAG in value:
            return self._untagged(value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(map(self.of, value))
        return value

    def _untagged(self, kept: Mapping[str, Any]) -> Any:
        match kept[_TAG]:
            case "on_device":
                tensor = kept["tensor"]
                if tensor not in self._tensors:
                    self._tensors[tensor] = tensor.to(self._device)
                return self._tensors[tensor]
            case "deque":
                return deque(self.of(kept["items"]), kept["maxlen"])
            case "frozenset":
                return frozenset(self.of(kept["items"]))
            case "numpy":
                array = numpy.frombuffer(kept["bytes"], dtype=kept["dtype"]).copy()
                return array[0] if kept["shape"] is None else array.reshape(kept["shape"])
        raise ValueError(f"unknown tag {kept[_TAG]!r}")


def put_into(now: Any, value: Any) -> Any:
    """Write a value into the container that an attribute is bound to, because other references may share it.

    Args:
        now: What the attribute is bound to.
        value: The value to restore.

    Returns:
        `now` with the contents of `value`, or `value` if `now` is no such container.
    """
    if type(now) in _DICTS and isinstance(value, dict):
        now.clear()
        now.update(value)
    elif type(now) is type(value) and isinstance(now, list | deque):
        now.clear()
        now.extend(value)
    elif type(now) is type(value) is set:
        now.clear()
        now.update(value)
    elif isinstance(now, numpy.ndarray) and isinstance(value, numpy.ndarray) and _fits(now, value):
        now[...] = value
    else:
        return value
    return now


def _fits(now: numpy.ndarray, value: numpy.ndarray) -> bool:
    return now.flags.writeable and (now.shape, now.dtype) == (value.shape, value.dtype)


def _is_array(value: Any) -> bool:
    """Return True for NumPy arrays and scalars, except arrays of objects or records."""
    return isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind not in "OV"
