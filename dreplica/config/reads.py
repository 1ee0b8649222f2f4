"""Record which settings a user's function reads, so that those that it ignores can be reported."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from dreplica.config.base import Section

_WHOLE = {"__dict__", "model_dump", "model_dump_json"}
"""Attributes through which all settings of a section are read."""
_EXTRA = {"__pydantic_extra__", "model_extra"}
"""Attributes through which all settings that the section does not declare are read."""

SectionT = TypeVar("SectionT", bound=Section)


class Reads:
    """The settings of a section, or of a whole config, that a function reads."""

    def __init__(self) -> None:
        self._read: set[str] = set()
        self._copies: list[tuple[str, Callable[[], Section | None]]] = []

    def of(self, section: SectionT, prefix: str = "") -> SectionT:
        """Return a copy of the same type that records which settings are read.

        Pass it on, and keep no reference.

        Args:
            section: The section or the whole config.
            prefix: Put before each key, such as `data.`.
        """
        read, extra = self._read, {f"{prefix}{name}" for name in section.__pydantic_extra__ or {}}
        nested = {name: value for name, value in section.__dict__.items() if isinstance(value, Section)}
        keys = {f"{prefix}{name}" for name in type(section).model_fields} | extra
        whole = keys | {f"{prefix}{name}.{key}" for name, value in nested.items() for key in _keys(value)}

        def get(self: Any, name: str) -> Any:
            if f"{prefix}{name}" in keys:
                read.add(f"{prefix}{name}")
            elif name in _WHOLE:
                read.update(whole)
            elif name in _EXTRA:
                read.update(extra)
            return base.__getattribute__(self, name)

        base = type(section)
        recording = type(base.__name__, (base,), {"__getattribute__": get, "__module__": base.__module__})
        copy: SectionT = object.__new__(recording)
        own = {name: self.of(value, f"{prefix}{name}.") for name, value in nested.items()}
        object.__setattr__(copy, "__dict__", section.__dict__ | own)
        for name in ("__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__"):
            object.__setattr__(copy, name, getattr(section, name))
        self._copies.append((prefix, weakref.ref(copy)))
        return copy

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Return those of the dotted keys that were not read, sorted.

        The settings of a copy that the function has kept may be read later, and count as read.
        """
        kept = tuple(prefix for prefix, reference in self._copies if reference() is not None)
        return sorted(key for key in keys if key not in self._read and not key.startswith(kept))


def _keys(section: Section) -> set[str]:
    return {*type(section).model_fields, *(section.__pydantic_extra__ or {})}
