"""Collectives for control messages.

They carry kilobytes of CPU data over gloo, and each wait is bounded.
"""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.distributed.liveness.monitor import LivenessMonitor
from dreplica.distributed.messages import BadMessage, decode, encode
from dreplica.errors import UsageError

Group: TypeAlias = dist.ProcessGroup | dist.ProcessGroupGloo
"""A process group, or a gloo group that is not registered with `torch.distributed`."""

_NAP_SECONDS = (0.00002, 0.002)


@dataclass(frozen=True)
class Posted:
    """A collective in flight, whose tensor must not be read before `Channel.wait`."""

    tensor: Tensor
    work: dist.Work | None


@dataclass(frozen=True)
class _Unsent:
    """Represents a value that cannot be sent."""

    reason: str


class Channel:
    """Control messages between all replicas of a process group.

    Without a process group, this process is the only replica.

    A wait ends with `ReplicaLost` when a peer closes its connection or after `timeout`. With a monitor it also ends
    as soon as any replica fails, and the error names the lost replicas.

    Args:
        group: A gloo process group, or None for the default group (for this process alone where there is none).
        monitor: The monitor that raises the alarm when a replica fails, if there is one.
        timeout: Longest wait for the other replicas, in seconds.
        timeout_name: The name of the setting that `timeout` is from.

    Attributes:
        ranks_of_job: The rank of each replica in the default process group.

    Note:
        `post_max`, `post_sum`, `wait`, `broadcast`, `sum` and `gather` are collectives: call them on every rank, in the
        same order.
    """

    def __init__(
        self,
        group: Group | None = None,
        monitor: LivenessMonitor | None = None,
        timeout: float = 300.0,
        timeout_name: str = "timeout",
    ) -> None:
        self._group = group if group is not None else dist.group.WORLD if dist.is_initialized() else None
        self.monitor = monitor
        self.timeout = timeout
        self._timeout_name = timeout_name
        self.rank = 0 if self._group is None else self._group.rank()
        self.size = 1 if self._group is None else self._group.size()
        self.ranks_of_job = list(range(self.size))

    def progress(self, step: int) -> None:
        """Note that this replica has taken `step` steps, before it compares the last one."""
        if self.monitor is not None:
            self.monitor.step, self.monitor.finishing = step, False

    def finish(self, step: int) -> None:
        """Note that this replica takes no step after `step`, before the last comparison."""
        if self.monitor is not None:
            self.monitor.step, self.monitor.finishing = step, True

    def rest(self) -> None:
        """Note that this replica waits for no other one until it calls `progress` again."""

    def close(self, error: BaseException | None = None) -> None:
        """Release what the channel holds.

        Args:
            error: The exception with which only this replica fails, which is reported to the others.
        """

    def post_max(self, tensor: Tensor) -> Posted:
        """Start the element-wise maximum of a CPU tensor over all replicas, in place.

        `wait` completes it.
        """
        return Posted(tensor, self._all_reduce(tensor, dist.ReduceOp.MAX) if self.size > 1 else None)

    def post_sum(self, tensor: Tensor) -> Posted:
        """Start the sum of a CPU tensor over all replicas, in place.

        `wait` completes it.
        """
        return Posted(tensor, self._all_reduce(tensor, dist.ReduceOp.SUM) if self.size > 1 else None)

    def wait(self, posted: Posted) -> Tensor:
        """Wait for a collective in flight and return its result.

        Raises:
            ReplicaLost: If it cannot be completed.
        """
        work, monitor = posted.work, self.monitor
        if work is None:
            return posted.tensor
        end = time.monotonic() + self.timeout
        nap, longest_nap = _NAP_SECONDS
        extended = False
        if monitor is not None:
            monitor.waiting = True
        while not work.is_completed():
            if monitor is not None and monitor.alarm.is_set():
                lost = monitor.join_check()
                if (lost or monitor.alarm.is_set()) and not work.is_completed():
                    raise monitor.replica_lost("another replica reported a failure", "alarm")
            if monitor is not None:
                monitor.watch_store()
            if time.monotonic() > end:
                # All replicas wait: one has just arrived, or they wait in different collectives.
                if monitor is None or extended or monitor.find_lost("timeout"):
                    raise self._timed_out()
                extended, end = True, time.monotonic() + self.timeout
            time.sleep(nap)
            nap = min(2 * nap, longest_nap)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._connection_lost(error) from error
        if monitor is not None:
            monitor.waiting = False
        return posted.tensor

    def _connection_lost(self, error: RuntimeError) -> ReplicaLost:
        line = _first_line(error)
        if self.monitor is None:
            text = f"lost the connection to another replica ({line}). See the other ranks' output for the cause."
            return ReplicaLost(text, code="connection-lost", error=line)
        self.monitor.find_lost()
        return self.monitor.replica_lost("lost the connection to another replica", "connection-lost", error=line)

    def _timed_out(self) -> ReplicaLost:
        if self.monitor is None:
            text = (
                f"no response from another replica for {self.timeout:g} s: it hangs, or it skipped a comparison that "
                "this replica takes part in"
            )
            return ReplicaLost(text, code="timeout", seconds=self.timeout)
        noticed = f"no response for {self.timeout:g} s ({self._timeout_name})"
        return self.monitor.replica_lost(noticed, "timeout", seconds=self.timeout)

    def broadcast(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """Copy one rank's tensor to all replicas, in place.

        Args:
            tensor: A contiguous CPU tensor of the same shape and dtype on all replicas.
            rank: The rank whose values are copied.

        Returns:
            `tensor`.
        """
        if self.size > 1:
            sent = tensor.view(-1).view(torch.uint8)  # as bytes: gloo does not support every dtype
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = rank, 0
            self.wait(Posted(sent, self._start("broadcast", [sent], options)))
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a CPU tensor over all replicas, in place."""
        return self.wait(self.post_sum(tensor))

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of each replica, in the order of ranks.

        Args:
            value: What `messages.encode` can send.

        Raises:
            BadMessage: If it cannot send the value of some replica. It is raised on all of them.
        """
        if self.size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(_encode(value)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        sizes[self.rank] = payload.numel()
        self.wait(self.post_max(sizes))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device="cpu")
        padded[: payload.numel()] = payload
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        self.wait(Posted(padded, self._start("allgather", [rows], [padded], AllgatherOptions())))
        values = [decode(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]
        for rank, each in enumerate(values):
            if isinstance(each, _Unsent):
                raise BadMessage(f"replica {rank}: {each.reason}", code="unsendable", replica=rank)
        return values

    def _all_reduce(self, tensor: Tensor, op: Any) -> dist.Work:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        return self._start("allreduce", [tensor], options)

    def _start(self, collective: str, *args: Any) -> dist.Work:
        if self._group is None:
            raise UsageError("the process group of this channel was destroyed, or the channel is closed", code="closed")
        # The channel limits its waits itself, so gloo's timeout only has to be longer.
        args[-1].timeout = timedelta(seconds=2 * self.timeout + 60)
        try:
            return getattr(self._group, collective)(*args)
        except RuntimeError as error:
            raise self._connection_lost(error) from error


def _encode(value: Any) -> bytes:
    """Return the value as bytes, or the reason why it cannot be sent, so that no replica waits for it."""
    try:
        return encode(value)
    except BadMessage as error:
        return encode(_Unsent(str(error)))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
