"""Access to evidence and remedies in tests, as objects of a verdict or as JSON values of a report."""

from collections.abc import Iterable, Mapping
from typing import Any


def _fields(item: Any) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = item if isinstance(item, Mapping) else item.as_dict()
    return fields


def codes(items: Iterable[Any]) -> list[str]:
    """Return the codes of evidence or remedies."""
    return [_fields(item)["code"] for item in items]


def texts(items: Iterable[Any]) -> list[str]:
    """Return the texts of evidence or remedies."""
    return [_fields(item)["text"] for item in items]


def commands(items: Iterable[Any]) -> list[str]:
    """Return the commands of those remedies that have one."""
    return [_fields(item)["command"] for item in items if _fields(item)["command"]]


def data_of(items: Iterable[Any], code: str) -> Mapping[str, Any]:
    """Return the data of the only item with a code."""
    (found,) = [_fields(item)["data"] for item in items if _fields(item)["code"] == code]
    data: Mapping[str, Any] = found
    return data


def text_of(items: Iterable[Any], code: str) -> str:
    """Return the text of the only item with a code."""
    (found,) = [_fields(item)["text"] for item in items if _fields(item)["code"] == code]
    return str(found)
