"""Encoding of control messages: values and tensors as bytes, and back, without running code.

A message is MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md). What MessagePack has no type for is
an extension of it: tuples, sets, tensors and arrays as raw bytes, and dreplica's own dataclasses, by name and fields. A
message cannot name any other class, so a sender cannot make the receiver run anything.
"""

import dataclasses
import enum
import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy
import torch
from torch import Tensor

from dreplica.errors import DreplicaError

MAX_BYTES = 2**31
"""Largest message, in bytes."""
_MAX_DEPTH = 100
"""Most extensions that contain one another."""
_PACKAGE = f"{__name__.partition('.')[0]}."
_INTEGER, _TENSOR, _ARRAY, _DTYPE, _RECORD, _ENUM, _PATH = range(7)
"""Types of the extensions, of which these are not sequences."""
_SEQUENCES: dict[int, type] = {10: tuple, 11: set, 12: frozenset, 13: torch.Size}
_OF_SEQUENCE = {kind: code for code, kind in _SEQUENCES.items()}
_BY_ROW, _BY_COLUMN = (torch.sparse_csr, torch.sparse_bsr), (torch.sparse_csc, torch.sparse_bsc)
_ARRAY_KINDS = "biufc"
"""Kinds of NumPy dtypes whose elements are numbers."""


class BadMessage(DreplicaError):
    """A message that cannot be sent or read."""

    default_code = "bad-message"


def encode(value: Any) -> bytes:
    """Return a value as bytes.

    Args:
        value: None, a number, a string, bytes, a path, a tensor, a NumPy array of numbers, an instance of one of
            dreplica's dataclasses, named tuples or enumerations, or a list, tuple, set or mapping of these. Tensors
            arrive on the CPU, mappings as dicts, and NumPy's numbers as Python's.

    Raises:
        BadMessage: If the value contains anything else, or is too large.
    """
    try:
        data = _pack(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadMessage(f"cannot send this to the other replicas: {error}", code="unsendable") from error
    if len(data) > MAX_BYTES:
        text = f"cannot send {len(data)} bytes in one message to the other replicas: the limit is {MAX_BYTES}"
        raise BadMessage(text, code="too-large", num_bytes=len(data))
    return data


def decode(data: bytes) -> Any:
    """Return the value that `encode` has made these bytes from.

    Raises:
        BadMessage: If the bytes are no such message.
    """
    try:
        return _unpack(data)
    except Exception as error:  # MessagePack documents several kinds, and bytes of a stranger can provoke any
        text = f"a control message of {len(data)} bytes cannot be read ({type(error).__name__}: {error})"
        raise BadMessage(text, code="unreadable", num_bytes=len(data)) from error


def _pack(value: Any, depth: int = 0) -> bytes:
    _check_depth(depth)
    extend = partial(_extend, depth=depth + 1)
    packed = msgpack.packb(value, default=extend, strict_types=True, unicode_errors="surrogatepass")
    return cast(bytes, packed)


def _unpack(data: bytes, depth: int = 0) -> Any:
    _check_depth(depth)
    restore = partial(_restore, depth=depth + 1)
    return msgpack.unpackb(data, ext_hook=restore, strict_map_key=False, unicode_errors="surrogatepass")


def _check_depth(depth: int) -> None:
    """Limit the recursion, which would overflow the stack of MessagePack's C code and end the process."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} values are nested")


def _extend(value: Any, depth: int) -> Any:
    """Return what represents a value that MessagePack has no type for."""
    kind, pack = type(value), partial(_pack, depth=depth)
    if kind in _OF_SEQUENCE:
        return msgpack.ExtType(_OF_SEQUENCE[kind], pack(list(value)))
    if kind is int:  # of more than 64 bits
        return msgpack.ExtType(_INTEGER, str(value).encode())
    if kind is torch.dtype:
        return msgpack.ExtType(_DTYPE, _name_of(value).encode())
    if isinstance(value, Path):
        return msgpack.ExtType(_PATH, os.fsencode(value))
    if isinstance(value, Tensor):
        return msgpack.ExtType(_TENSOR, pack(_of_tensor(value)))
    if kind is numpy.ndarray and value.dtype.kind in _ARRAY_KINDS:
        return msgpack.ExtType(_ARRAY, pack([value.dtype.str, list(value.shape), value.tobytes()]))
    if _is_own(kind) and isinstance(value, enum.Enum):
        return msgpack.ExtType(_ENUM, pack([kind.__module__, kind.__qualname__, value.value]))
    if _is_own(kind) and _fields(kind):
        row = {name: getattr(value, name) for name in _fields(kind)}
        return msgpack.ExtType(_RECORD, pack([kind.__module__, kind.__qualname__, row]))
    if isinstance(value, numpy.generic) and value.dtype.kind in _ARRAY_KINDS:
        return value.item()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it contains a {kind.__module__}.{kind.__qualname__}")


def _restore(code: int, data: bytes, depth: int) -> Any:
    """Return the value that an extension represents."""
    unpack = partial(_unpack, depth=depth)
    if code in _SEQUENCES:
        return _SEQUENCES[code](unpack(data))
    if code == _INTEGER:
        return int(data)
    if code == _DTYPE:
        return _dtype(data.decode())
    if code == _PATH:
        return Path(os.fsdecode(data))
    if code == _TENSOR:
        return _to_tensor(*unpack(data))
    if code == _ARRAY:
        dtype, shape, content = unpack(data)
        if numpy.dtype(dtype).kind not in _ARRAY_KINDS:
            raise ValueError(f"an array of {dtype}")
        return numpy.frombuffer(bytearray(content), dtype).reshape(shape)
    if code not in (_ENUM, _RECORD):
        raise ValueError(f"extension {code}")
    module, name, content = unpack(data)
    kind = _find(module, name)
    if code == _ENUM:
        return kind(content)
    if content.keys() != set(_fields(kind)):
        raise ValueError(f"fields of a {name}")
    if issubclass(kind, tuple):
        return tuple.__new__(kind, [content[field] for field in _fields(kind)])
    record = object.__new__(kind)  # without the class's code
    for field, item in content.items():
        object.__setattr__(record, field, item)
    return record


def _is_own(kind: type) -> bool:
    return kind.__module__.startswith(_PACKAGE)


def _fields(kind: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or named tuple, empty for any other class."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return getattr(kind, "_fields", ()) if issubclass(kind, tuple) else ()


def _find(module: str, name: str) -> Any:
    """Return the class of this name, from a module of this package that is loaded already."""
    found = getattr(sys.modules[module], name) if module.startswith(_PACKAGE) else None
    if not isinstance(found, type) or not _is_own(found) or not (_fields(found) or issubclass(found, enum.Enum)):
        raise ValueError(f"class {module}.{name}")
    return found


def _name_of(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name}")
    return found


def _of_tensor(tensor: Tensor) -> list[Any]:
    """Return dtype, shape and contents: the bytes of a dense tensor, or the layout and the parts of a sparse one."""
    tensor = tensor.detach()
    kind = [_name_of(tensor.dtype), list(tensor.shape)]
    if tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"it contains a tensor of dtype {tensor.dtype} on {tensor.device}")
    if tensor.layout is torch.sparse_coo:
        return [*kind, [_name_of(tensor.layout), tensor._indices(), tensor._values(), tensor.is_coalesced()]]
    if tensor.layout in _BY_ROW or tensor.layout in _BY_COLUMN:
        by_row = tensor.layout in _BY_ROW
        offsets = tensor.crow_indices() if by_row else tensor.ccol_indices()
        places = tensor.col_indices() if by_row else tensor.row_indices()
        return [*kind, [_name_of(tensor.layout), offsets, places, tensor.values()]]
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"it contains a tensor of layout {tensor.layout}")
    # As bytes: neither NumPy nor gloo supports every dtype.
    dense = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return [*kind, dense.view(-1).view(torch.uint8).numpy().tobytes()]


def _to_tensor(name: str, shape: list[int], content: bytes | list[Any]) -> Tensor:
    dtype = _dtype(name)
    if isinstance(content, list):
        layout, one, two, three = content
        if layout == _name_of(torch.sparse_coo):
            return torch.sparse_coo_tensor(one, two, shape, is_coalesced=three, check_invariants=True)
        kind = next(each for each in (*_BY_ROW, *_BY_COLUMN) if _name_of(each) == layout)
        return torch.sparse_compressed_tensor(one, two, three, shape, layout=kind, check_invariants=True)
    if len(content) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(content)} bytes for a tensor of {name} {shape}")
    if not content:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).view(shape)
