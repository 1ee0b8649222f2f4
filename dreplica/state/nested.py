"""Leaves of nested containers, such as a `state_dict`, by their paths."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]
"""Keys and positions that lead from a container to a leaf."""


def leaves_of(container: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield everything in nested dicts, lists and tuples that is no such container, with its path."""
    if isinstance(container, Mapping | list | tuple):
        items = container.items() if isinstance(container, Mapping) else enumerate(container)
        for key, item in items:
            yield from leaves_of(item, (*path, key))
    else:
        yield path, container


def replaced(container: Any, path: Path, value: Any) -> Any:
    """Return a copy of nested containers with another leaf. Only the containers on the path are copied.

    Args:
        container: Nested dicts, lists and tuples.
        path: Keys and positions that lead to the leaf.
        value: The new leaf.
    """
    if not path:
        return value
    changed = list(container) if isinstance(container, tuple) else copy.copy(container)
    changed[path[0]] = replaced(changed[path[0]], path[1:], value)
    return type(container)(changed) if isinstance(container, tuple) else changed
