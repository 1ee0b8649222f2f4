"""Local work between collectives, which may fail on one replica."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from dreplica.distributed.channel import Channel
from dreplica.distributed.failure import Failure

T = TypeVar("T")


class AttemptFailed(Exception):
    """Local work failed on some replica, raised on all of them.

    Attributes:
        failures: What each replica that failed has raised, by replica id.
    """

    def __init__(self, failures: Mapping[int, Failure]) -> None:
        super().__init__("; ".join(f"replica {rank} raised {failure}" for rank, failure in failures.items()))
        self.failures = dict(failures)


def attempt(channel: Channel, action: Callable[[], T]) -> T:
    """Run `action` on each replica and return its result.

    Note:
        Collective: call on every rank. `action` itself takes part in no collective.

    Raises:
        AttemptFailed: On all replicas, if `action` raised on any.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = Failure.from_exception(error)
    failures = {replica_id: item for replica_id, item in enumerate(channel.gather(failure)) if item is not None}
    if failures:
        raise AttemptFailed(failures)
    return result  # type: ignore[return-value]  # None only where T is
