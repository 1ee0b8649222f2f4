"""Errors of one replica, raised on all of them."""

from collections.abc import Callable
from typing import TypeVar

from dreplica.distributed.channel import Channel
from dreplica.distributed.failure import Failure
from dreplica.errors import SharedUsageError, UsageError

T = TypeVar("T")


def together(channel: Channel, action: Callable[[], T]) -> T:
    """Run `action` on each replica, and raise an error of one replica on all of them.

    Note:
        Collective: call it on every rank. `action` itself takes part in no collective.

    Args:
        channel: The control channel between all replicas.
        action: The work of this replica.

    Returns:
        The result of `action` on this replica.

    Raises:
        SharedUsageError: On all replicas, if `action` raised `UsageError` on any. It has the code and the fields of the
            error of the first such replica, and the field `replicas`, the ids of all of them.
    """
    result, failure = None, None
    try:
        result = action()
    except UsageError as error:
        failure = Failure.from_exception(error).as_dict()
    rows = channel.gather(failure)
    failed = {replica_id: Failure.from_dict(row) for replica_id, row in enumerate(rows) if row is not None}
    if failed:
        raise _shared_error(failed, channel.size)
    return result  # type: ignore[return-value]  # None only where T is


def _shared_error(failed: dict[int, Failure], num_replicas: int) -> SharedUsageError:
    first, failure = next(iter(failed.items()))
    text = failure.message if len(failed) == num_replicas else f"replica {first}: {failure.message}"
    return SharedUsageError(text, code=failure.code, **{**failure.fields, "replicas": list(failed)})
