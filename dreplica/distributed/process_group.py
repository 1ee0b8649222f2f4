"""The processes of a run: joined at the start, left at the end, and one place where all of them fail together."""

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
from dreplica.distributed.liveness import LivenessMonitor, ReplicaLost, describe_exception
from dreplica.distributed.rendezvous import store_for_this_start
from dreplica.distributed.signals import exit_after_signal
from dreplica.errors import SharedUsageError, UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_JOIN_SECONDS = 600.0
_TOLD_SECONDS = 15.0
"""That the others may take to join once this replica is told to stop: so that all stop alike, if they come."""
_LAST_SECONDS = 30.0
"""That a replica may take to end once another is gone, before it is ended."""


@dataclass(frozen=True)
class World:
    """This process among all. `replica_id` is the global rank; rank 0 is the coordinator."""

    replica_id: int
    num_replicas: int
    channel: Channel
    monitor: LivenessMonitor | None
    host: str

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0."""
        return self.replica_id == 0

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` here and returns its result. A collective.

        Raises `SharedUsageError` on all replicas if `action` raises `UsageError` on any, so that none is left waiting.
        """
        result, problem = None, None
        try:
            result = action()
        except UsageError as error:
            problem = str(error)
        problems = self.channel.gather(problem)
        if any(text is not None for text in problems):
            blamed = [replica for replica, text in enumerate(problems) if text is not None]
            text = str(problems[blamed[0]])
            raise SharedUsageError(text if len(blamed) == len(problems) else f"replica {blamed[0]}: {text}")
        return result  # type: ignore[return-value]  # None only where T is


def env_rank() -> int:
    """This process's global rank as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def env_num_replicas() -> int:
    """The number of replicas as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def open_world(timeout: float) -> Iterator[World]:
    """Joins the replicas that the launcher started (or stands alone without one), and leaves them at the end.

    `timeout`: seconds until a silent replica counts as lost. Every exception inside is told to the other replicas, so
    that they end with `replica-lost` naming this one instead of waiting. After such an exception the process group is
    left as it is, since taking it down waits for what the lost replica never sends, and so does the interpreter's own
    end: end the process with `os._exit`.
    """
    replica_id, num_replicas, host = env_rank(), env_num_replicas(), socket.gethostname()
    if num_replicas == 1:
        yield World(0, 1, Channel(), None, host)
        return
    with exit_after_signal(_TOLD_SECONDS):
        shared, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS)))
        store = store_for_this_start(shared, replica_id, num_replicas)
    holds_store = replica_id == 0 and not _launcher_holds_store()
    monitor = LivenessMonitor(store, replica_id, num_replicas, holds_store, last_seconds=_LAST_SECONDS)
    try:
        # The channel does its own waiting; gloo's limit only has to be the longer of the two.
        with exit_after_signal(_TOLD_SECONDS):
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("gloo", store),
                rank=replica_id,
                world_size=num_replicas,
                timeout=timedelta(seconds=timeout + 60),
            )
        yield World(replica_id, num_replicas, Channel(None, monitor, timeout), monitor, host)
    except (SharedUsageError, ReplicaLost) as error:
        # Either all replicas raise it, or it is another that is gone: this one has nothing to tell.
        monitor.close()
        if isinstance(error, SharedUsageError):
            dist.destroy_process_group()
        raise
    except BaseException as error:
        monitor.report_failure(describe_exception(error))
        monitor.close()
        raise
    monitor.close()
    dist.destroy_process_group()


def _launcher_holds_store() -> bool:
    """Whether the store that replicas meet at is torchrun's, and outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
