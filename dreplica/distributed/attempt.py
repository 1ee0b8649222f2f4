"""Local work between collectives that may fail on one replica without leaving the others waiting."""

from collections.abc import Callable
from typing import TypeVar

from dreplica.distributed.channel import Channel
from dreplica.distributed.liveness import describe_exception

T = TypeVar("T")


class AttemptFailed(Exception):
    """Some replica could not do its part; raised on all of them. `reasons`: replica id to what it raised."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"replica {replica_id}: {reason}" for replica_id, reason in reasons.items()))
        self.reasons = reasons


def attempt(channel: Channel, action: Callable[[], T]) -> T:
    """Runs `action`, which takes part in no collective, and returns its result. A collective.

    Raises AttemptFailed on all replicas if it raises on any.
    """
    result, reason = None, None
    try:
        result = action()
    except Exception as error:
        reason = describe_exception(error)
    reasons = dict(enumerate(channel.gather(reason)))
    failed = {replica_id: text for replica_id, text in reasons.items() if text is not None}
    if failed:
        raise AttemptFailed(failed)
    return result  # type: ignore[return-value]  # None only where T is
