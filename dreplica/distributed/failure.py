"""Exceptions of one replica, as data that the other replicas can read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dreplica.errors import DreplicaError


@dataclass(frozen=True)
class Failure:
    """An exception that ended or failed a replica's work."""

    kind: str
    """Name of the exception's type, such as `RuntimeError`."""
    message: str
    """Text of the exception."""
    code: str | None = None
    """Code of a `DreplicaError`, or None for any other exception."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of a `DreplicaError`, reduced to JSON values."""

    @classmethod
    def from_exception(cls, error: BaseException) -> "Failure":
        """Return the data of `error`."""
        if isinstance(error, DreplicaError):
            return cls(type(error).__name__, str(error), error.code, _as_json(error.fields))
        return cls(type(error).__name__, str(error))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Failure":
        """Return the failure that `as_dict` was called on."""
        return cls(data["kind"], data["message"], data["code"], dict(data["fields"]))

    def as_dict(self) -> dict[str, Any]:
        """Return the failure as a dictionary of JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}".removesuffix(": ")


def describe_exception(error: BaseException) -> str:
    """Return the type and text of `error` on one line, as in the last line of a traceback."""
    return str(Failure.from_exception(error))


_MAX_DEPTH = 8
_MAX_CHARACTERS = 2000


def _as_json(value: Any, depth: int = 0) -> Any:
    """Reduce a value to JSON values of bounded size. YAML aliases can make a value contain itself."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < _MAX_DEPTH and isinstance(value, DreplicaError):
        return {"text": str(value), "code": value.code, "fields": _as_json(value.fields, depth + 1)}
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): _as_json(item, depth + 1) for key, item in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item, depth + 1) for item in value]
    try:
        return str(value)[:_MAX_CHARACTERS]
    except Exception:  # a user's object may not be printable
        return f"<{type(value).__name__}>"
