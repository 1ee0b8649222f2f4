"""What a run can end in: exit codes, and the one exception that is the user's to mend."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of each worker and of the `dreplica` commands."""

    AGREED = 0
    FAILED = 1
    UNUSABLE = 2
    DIVERGED = 3
    STOPPED = 4


class UsageError(ValueError):
    """Unusable config, data or arguments: the run ends with exit code 2 and this one message, no traceback.

    The message names the key and the value and ends with a hint.
    """


class SharedUsageError(UsageError):
    """A `UsageError` that every replica raises at the same point, so that nobody waits for anybody."""
