"""The process group of a run, and errors that all replicas raise together."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dreplica.distributed.channel import Channel
from dreplica.distributed.launch.environment import Launch, detect_launch
from dreplica.distributed.liveness.lost import Lost, ReplicaLost, is_reporter
from dreplica.distributed.liveness.monitor import LivenessMonitor, find_lost_replicas
from dreplica.distributed.rendezvous.rendezvous import rendezvous
from dreplica.distributed.rendezvous.store import Endpoint, NotArrived
from dreplica.distributed.rendezvous.wait import Wait, WaitTimeout
from dreplica.distributed.signals import exit_after_signal
from dreplica.distributed.together import together
from dreplica.errors import SharedUsageError

T = TypeVar("T")

_STOP_GRACE_SECONDS = 15.0
"""Seconds that a replica still waits for the others at rendezvous after a signal to stop, so that all stop alike."""
_GLOO_SECONDS = 60.0
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
        return together(self.channel, action)


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
        timeout: Seconds until a replica that does not arrive or respond counts as lost.

    Yields:
        The world, of one process without a launcher.

    Raises:
        UsageError: The variables of the launch or the address of the rendezvous cannot be used.
        ReplicaLost: Replicas did not arrive in time, or cannot be connected. It has the field `reports`, True on the
            rank that reports it.
    """
    launch, host_name = detect_launch(os.environ), socket.gethostname()
    if launch.is_alone:
        yield World(0, 1, Channel(), None, host_name)
        return
    serves = launch.rank == 0 and not _launcher_holds_store()
    with exit_after_signal(_STOP_GRACE_SECONDS):
        store = _rendezvous(launch, timeout, serves)
    monitor = LivenessMonitor(store, launch.rank, launch.size, serves, last_seconds=_LAST_SECONDS)
    try:
        with exit_after_signal(_STOP_GRACE_SECONDS):
            _connect(store, launch, timeout, monitor)
        yield World(launch.rank, launch.size, Channel(None, monitor, timeout, "world.timeout"), monitor, host_name)
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


def _rendezvous(launch: Launch, timeout: float, serves: bool) -> dist.Store:
    """Wait until all replicas have arrived, and return a store for this start.

    Raises:
        UsageError: The launch cannot be used.
        ReplicaLost: Replicas did not arrive in time. It has the field `reports`, True on the rank that reports it.
    """
    try:
        return rendezvous(Endpoint(*launch.require_address()), launch.rank, launch.size, timeout, serves)
    except NotArrived as error:
        lost = [Lost(rank) for rank in error.ranks]
        raise ReplicaLost(str(error), code="not-arrived", lost=lost, reports=error.reports) from error


def _connect(store: dist.Store, launch: Launch, timeout: float, monitor: LivenessMonitor) -> None:
    """Initialize the process group, which connects each replica to all others.

    Raises:
        ReplicaLost: They cannot be connected. It has the field `reports`, True on the rank that reports it.
    """
    wait = Wait(timeout)
    wait.start("all ranks to connect to each other")

    def connect() -> None:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=launch.rank,
            world_size=launch.size,
            # The channel limits its waits itself, so gloo's timeout only has to be longer.
            timeout=timedelta(seconds=timeout + _GLOO_SECONDS),
        )

    monitor.waiting = True
    try:
        wait.run(connect, monitor.alarm.is_set)
    except (RuntimeError, WaitTimeout) as error:
        failed = ReplicaLost(code="connection-lost", error=str(error).partition("\n")[0])
        lost = find_lost_replicas(monitor, failed)
        raise _not_connected(failed, lost, launch) from error
    monitor.waiting = False


def _not_connected(error: ReplicaLost, lost: list[Lost], launch: Launch) -> ReplicaLost:
    if lost:
        text = "; ".join(f"replica {item.replica_id}: {item.reason}" for item in lost)
    else:
        text = (
            f"the replicas cannot connect to each other ({error.fields['error']}). Set GLOO_SOCKET_IFNAME to the "
            "network interface that connects their hosts (`ip -brief addr` lists them)."
        )
    reports = is_reporter(lost, launch.rank, launch.size)
    return ReplicaLost(text, code="connection-lost", lost=lost, reports=reports, error=error.fields["error"])


def _launcher_holds_store() -> bool:
    """Return True if torchrun serves the rendezvous store, which then outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
