"""The process group of a run, and errors that all replicas raise together."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dreplica.distributed.channel import Channel
from dreplica.distributed.failure import Failure
from dreplica.distributed.launch_environment import detect_launch
from dreplica.distributed.liveness import LivenessMonitor, ReplicaLost
from dreplica.distributed.rendezvous import store_for_this_start
from dreplica.distributed.signals import exit_after_signal
from dreplica.errors import SharedUsageError, UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_RENDEZVOUS_SECONDS = 600.0
_STOP_GRACE_SECONDS = 15.0
"""Seconds that a replica still waits for the others at rendezvous after a signal to stop, so that all stop alike."""
_LAST_SECONDS = 30.0
"""Seconds until a surviving process is ended after another replica was lost."""


@dataclass(frozen=True)
class World:
    """This process and its connection to the other replicas of a run."""

    replica_id: int
    """Global rank of this process."""
    num_replicas: int
    """Number of replicas on all nodes."""
    channel: Channel
    """Control messages between all replicas."""
    monitor: LivenessMonitor | None
    """Detection of failed replicas, or None for a run of one process."""
    host: str
    """Host name of this node."""

    @property
    def is_coordinator(self) -> bool:
        """True on rank 0."""
        return self.replica_id == 0

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on each replica, and raise an error of one replica on all of them.

        Note:
            Collective: call on every rank. `action` itself takes part in no collective.

        Returns:
            The result of `action` on this replica.

        Raises:
            SharedUsageError: On all replicas, if `action` raised `UsageError` on any. It has the code and the fields
                of the error of the first such replica, and the field `replicas`, the ids of all of them.
        """
        result, failure = None, None
        try:
            result = action()
        except UsageError as error:
            failure = Failure.from_exception(error).as_dict()
        rows = self.channel.gather(failure)
        failed = {replica_id: Failure.from_dict(row) for replica_id, row in enumerate(rows) if row is not None}
        if failed:
            raise _shared_error(failed, self.num_replicas)
        return result  # type: ignore[return-value]  # None only where T is


def _shared_error(failed: dict[int, Failure], num_replicas: int) -> SharedUsageError:
    first, failure = next(iter(failed.items()))
    text = failure.message if len(failed) == num_replicas else f"replica {first}: {failure.message}"
    return SharedUsageError(text, code=failure.code, **{**failure.fields, "replicas": list(failed)})


def env_rank() -> int:
    """Return the global rank that the launcher set, or 0 without a launcher."""
    return detect_launch(os.environ).rank


def env_num_replicas() -> int:
    """Return the number of replicas that the launcher set, or 1 without a launcher."""
    return detect_launch(os.environ).size


@contextmanager
def open_world(timeout: float) -> Iterator[World]:
    """Connect to the replicas that the launcher started, and disconnect at the end.

    An exception inside is reported to the other replicas, so that they end with `replica-lost` and name this one
    instead of waiting for it. After such an exception the process group is not destroyed: that would wait for what
    the lost replica never sends, and so would a normal exit of the interpreter. End the process with `os._exit`.

    Args:
        timeout: Seconds until a replica that does not respond counts as lost.

    Yields:
        The world, of one process without a launcher.
    """
    replica_id, num_replicas, host = env_rank(), env_num_replicas(), socket.gethostname()
    if num_replicas == 1:
        yield World(0, 1, Channel(), None, host)
        return
    with exit_after_signal(_STOP_GRACE_SECONDS):
        shared, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_RENDEZVOUS_SECONDS)))
        store = store_for_this_start(shared, replica_id, num_replicas)
    holds_store = replica_id == 0 and not _launcher_holds_store()
    monitor = LivenessMonitor(store, replica_id, num_replicas, holds_store, last_seconds=_LAST_SECONDS)
    try:
        # The channel limits its waits itself, so gloo's timeout only has to be longer.
        with exit_after_signal(_STOP_GRACE_SECONDS):
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("gloo", store),
                rank=replica_id,
                world_size=num_replicas,
                timeout=timedelta(seconds=timeout + 60),
            )
        yield World(replica_id, num_replicas, Channel(None, monitor, timeout), monitor, host)
    except (SharedUsageError, ReplicaLost) as error:
        # Nothing to report: either all replicas raise it, or another replica was lost.
        monitor.close()
        if isinstance(error, SharedUsageError):
            dist.destroy_process_group()
        raise
    except BaseException as error:
        monitor.report_failure(error)
        monitor.close()
        raise
    monitor.close()
    dist.destroy_process_group()


def _launcher_holds_store() -> bool:
    """Return True if torchrun serves the rendezvous store, which then outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
