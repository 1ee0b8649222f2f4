"""Exit codes and the base classes of exceptions.

An exception is data first: a stable `code` and fields for programs, then the text for people.
"""

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of each worker process and of the `dreplica` commands."""

    AGREED = 0
    FAILED = 1
    UNUSABLE = 2
    DIVERGED = 3
    STOPPED = 4


class DreplicaError(Exception):
    """Base class of the exceptions that dreplica raises.

    Args:
        text: The message for people.
        code: Stable identifier for programs. Defaults to the class's `default_code`.
        **fields: The data that the text is made from, such as `key` and `value`.

    Attributes:
        code: Stable identifier for programs.
        fields: The data that the text is made from.
    """

    default_code = "error"

    def __init__(self, text: str = "", *, code: str | None = None, **fields: Any) -> None:
        super().__init__(text)
        self.code = code or self.default_code
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        # The default passes only `args`, so a copy from another process would lose code and fields.
        return _restore, (type(self), self.args, self.__dict__)


class UsageError(DreplicaError, ValueError):
    """Invalid config, data, arguments or environment, which the user can fix.

    The run ends with exit code 2 and this message, without a traceback. The message names the key and the value and
    ends with the fix.
    """

    default_code = "usage"


class SharedUsageError(UsageError):
    """A `UsageError` that every replica raises at the same point, so that no replica waits for another."""


def _restore(kind: type[DreplicaError], args: tuple[Any, ...], state: dict[str, Any]) -> DreplicaError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
