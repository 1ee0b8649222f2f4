"""Rendering of the texts of evidence and remedies from their data."""

import math
import string
from collections.abc import Mapping
from typing import Any


class _Formatter(string.Formatter):
    """`str.format`, with lists of strings joined by commas."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
            value = ", ".join(value)
        return str(super().format_field(value, format_spec))


_FORMATTER = _Formatter()


def render(template: str, data: Mapping[str, Any]) -> str:
    """Fill the `{fields}` of a template. Lists of strings are joined by commas."""
    return _FORMATTER.vformat(template, (), data)


def plain(value: Any) -> Any:
    """Convert a value to one that JSON holds: tuples become lists, anything unknown its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
