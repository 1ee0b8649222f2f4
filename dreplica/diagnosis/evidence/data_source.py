"""What a data set holds: the split, generators, files and values from which its samples come.

Samples that differ between replicas are of little help. What the data sets hold is compared, too: it shows whether the
split, the numbering of classes or the data themselves differ, or nothing that the data set keeps.
"""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.names import list_names
from dreplica.state.fingerprint.fingerprint import UnhashableError, digest_bytes, digest_tensor

_GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator, torch.Generator)
_MOST_OBJECTS = 500
"""Objects whose attributes are read. Others are samples rather than what makes them."""
_MOST_ITEMS = 100_000
"""Items of a list or dict that are read."""
_MOST_BYTES = 2**28
"""Size of a tensor or array that is read, in bytes."""
_LONGEST_TEXT = 60

Held = dict[str, Any]
"""What a data set holds, as values that a message carries: see `describe_held`."""


def describe_held(dataset: Dataset[Any]) -> Held:
    """Return digests of what a data set and the objects inside of it hold.

    Args:
        dataset: The data set.

    Returns:
        `values`: attribute to what `_digests` returns, for plain values, tensors and arrays.
        `splits`: attributes that are the indices of a `Subset`. `generators`: attributes that are random generators.
        `files`: an attribute that holds paths of files that exist, if there is one. `hash`: the hash of a text.
    """
    held: Held = {"values": {}, "splits": [], "generators": [], "files": None, "hash": hash("dreplica")}
    pending: deque[tuple[str, Any]] = deque([("", dataset)])
    seen: set[int] = set()
    while pending and len(seen) < _MOST_OBJECTS:
        path, owner = pending.popleft()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in getattr(owner, "__dict__", {}).items():
            here = f"{path}.{name}" if path else name
            if isinstance(value, _GENERATORS):
                held["generators"].append(here)
            elif isinstance(owner, Subset) and name == "indices":
                held["splits"].append(here)
                held["values"][here] = _digests(list(value))
            elif _is_data(value):
                held["values"][here] = _digests(value)
                held["files"] = held["files"] or (here if _names_files(value) else None)
            else:
                pending.extend(_inner(here, value))
    held["values"] = {name: row for name, row in held["values"].items() if row is not None}
    return held


def compare_held(rows: Sequence[Held], num_differing: int, batch_size: int) -> list[Evidence]:
    """Return evidence of what the replicas' data sets hold alike, and what differs.

    Args:
        rows: What each replica's data set holds, by replica id.
        num_differing: Samples of the batch that are different data on different replicas, each loaded alone.
        batch_size: Samples in the batch.
    """
    names = [name for name in rows[0]["values"] if all(name in row["values"] for row in rows)]
    differing = [name for name in names if len({row["values"][name][0] for row in rows}) > 1]
    splits = [name for name in differing if name in rows[0]["splits"]]
    lines = []
    if splits:
        lines.append(Evidence.of("data-split-differs", some=list_names(splits), names=splits))
    others = [name for name in differing if name not in splits]
    moved = [name for name in others if len({row["values"][name][1] for row in rows}) == 1]
    texts = [name for name in moved if any(row["values"][name][3] for row in rows)]
    kinds = {
        "data-names-moved": texts,
        "data-rows-moved": [name for name in moved if name not in texts],
        "data-differ": [name for name in others if name not in moved],
    }
    for code, some in kinds.items():
        if some:
            values = [row["values"][some[0]][2] for row in rows]
            shown = f": {values[0]} on replica 0, {values[-1]} on replica {len(rows) - 1}" if values[0] else ""
            lines.append(Evidence.of(code, some=list_names(some), shown=shown, names=some, values=values))
    if kinds["data-differ"] and 0 < 2 * num_differing <= batch_size:
        lines.append(Evidence.of("data-few-samples", count=batch_size - num_differing, size=batch_size))
    if names and not differing:
        lines.append(Evidence.of("data-same", count=len(names)))
    generators = rows[0]["generators"]
    if generators:
        lines.append(Evidence.of("data-generators", some=list_names(generators), names=generators))
    if rows[0]["files"]:
        lines.append(Evidence.of("data-from-files", name=rows[0]["files"]))
    explained = splits or generators or kinds["data-rows-moved"] or 2 * num_differing <= batch_size
    if not explained and len({row["hash"] for row in rows}) > 1:
        lines.append(Evidence.of("hashes-differ"))
    return lines


def _inner(path: str, value: Any) -> list[tuple[str, Any]]:
    """Return the objects to look into: data sets, transforms, and those in short lists."""
    if isinstance(value, list | tuple):
        return [(f"{path}.{index}", each) for index, each in enumerate(value[:_MOST_OBJECTS]) if _is_owner(each)]
    return [(path, value)] if _is_owner(value) else []


def _is_owner(value: Any) -> bool:
    return (
        not isinstance(value, type)
        and hasattr(value, "__dict__")
        and (callable(value) or hasattr(type(value), "__getitem__"))
    )


def _is_data(value: Any) -> bool:
    if isinstance(value, Tensor | numpy.ndarray):
        return True
    return isinstance(value, str | int | float | bool | bytes | Path | list | tuple | dict) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Return True for text and numbers, also within lists, tuples and dicts."""
    if isinstance(value, dict):
        return len(value) <= _MOST_ITEMS and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return len(value) <= _MOST_ITEMS and all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool | bytes | Path | numpy.generic)


def _digests(value: Any) -> list[Any] | None:
    """Return digests of a value with and without the order of its items, a short value's text, and if it has texts."""
    if isinstance(value, Tensor | numpy.ndarray):
        return _of_array(value)
    text = repr(value)
    leaves = _leaves(value)
    items = sorted(map(repr, leaves))
    digests = digest_bytes("", text.encode()), digest_bytes("", repr(items).encode())
    shown = text if len(text) <= _LONGEST_TEXT else ""
    return [*(digest.hex() for digest in digests), shown, any(isinstance(leaf, str | Path) for leaf in leaves)]


def _of_array(value: Tensor | numpy.ndarray) -> list[Any] | None:
    if isinstance(value, numpy.ndarray):
        if value.dtype.hasobject or value.dtype.kind not in "biufc":
            items = value.tolist() if value.size <= _MOST_ITEMS else None
            return _digests(items) if items is not None and _is_plain(items) else None
        value = torch.from_numpy(numpy.ascontiguousarray(value))
    if value.layout is not torch.strided or value.is_meta or value.nbytes > _MOST_BYTES:
        return None
    try:
        rows = value.detach().cpu()
        whole = digest_tensor("", rows).hex()
        # Rows in another order are the same samples in another order.
        each = (
            sorted(digest_tensor("", row) for row in rows[:_MOST_ITEMS])
            if rows.dim() and len(rows) <= _MOST_ITEMS
            else []
        )
    except UnhashableError:
        return None
    return [whole, digest_bytes("", b"".join(each)).hex() if each else whole, "", False]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for pair in value.items() for each in pair for leaf in _leaves(each)]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _names_files(value: Any) -> bool:
    """Return True if a value is, or begins with, the path of a file or folder that exists."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, Path):
        return value.exists()
    return isinstance(value, str) and len(value) < 4096 and ("/" in value or "." in value) and Path(value).exists()
