"""Collectives for control messages.

They carry kilobytes of CPU data over gloo, and each wait is bounded.
"""

import io
import os
import pickle
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dreplica.distributed.launch_environment import check_alone
from dreplica.distributed.liveness import LivenessMonitor, ReplicaLost

_NAP_SECONDS = (0.00002, 0.002)


@dataclass(frozen=True)
class Posted:
    """A collective in flight, whose tensor must not be read before `Channel.wait`."""

    tensor: Tensor
    work: dist.Work | None


class Channel:
    """Control messages between all replicas of a process group.

    Without a process group, this process is the only replica.

    A wait ends with `ReplicaLost` when a peer closes its connection or after `timeout`. With a monitor it also ends
    as soon as any replica raises the alarm.

    Args:
        group: A gloo process group, or None for the default group (for this process alone where there is none).
        monitor: The monitor that raises the alarm when a replica fails, if there is one.
        timeout: Longest wait for the other replicas, in seconds.

    Note:
        All methods are collectives: call them on every rank, in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        monitor: LivenessMonitor | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.group = group
        self.monitor = monitor
        self.timeout = timeout
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1

    def close(self) -> None:
        """Release the connections."""

    def post_max(self, tensor: Tensor) -> Posted:
        """Start the element-wise maximum of a CPU tensor over all replicas, in place.

        `wait` completes it.
        """
        work = None
        if self.size > 1:
            try:
                work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
            except RuntimeError as error:
                raise self._connection_lost(error) from error
        return Posted(tensor, work)

    def wait(self, posted: Posted) -> Tensor:
        """Wait for a collective in flight and return its result.

        Raises:
            ReplicaLost: If it cannot be completed.
        """
        work = posted.work
        if work is None:
            return posted.tensor
        end = time.monotonic() + self.timeout
        nap, longest_nap = _NAP_SECONDS
        if self.monitor is not None:
            self.monitor.waiting = True
        while not work.is_completed():
            if self.monitor is not None and self.monitor.alarm.is_set():
                raise ReplicaLost("another replica reported a failure", code="alarm")
            if time.monotonic() > end:
                raise self._timed_out()
            time.sleep(nap)
            nap = min(2 * nap, longest_nap)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._connection_lost(error) from error
        if self.monitor is not None:
            self.monitor.waiting = False
        return posted.tensor

    def _connection_lost(self, error: RuntimeError) -> ReplicaLost:
        line = text = _first_line(error)
        if self.monitor is None:  # with a monitor, the lost replica is named
            text = f"lost the connection to another replica ({line}). See the other ranks' output for the cause."
        return ReplicaLost(text, code="connection-lost", error=line)

    def _timed_out(self) -> ReplicaLost:
        text = f"no response for {self.timeout:g} s (world.timeout)"
        if self.monitor is None:
            text = (
                f"no response from another replica for {self.timeout:g} s: it hangs, or it skipped a comparison that "
                "this replica takes part in"
            )
        return ReplicaLost(text, code="timeout", seconds=self.timeout)

    def broadcast(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """Copy one rank's tensor to all replicas, in place.

        Args:
            tensor: A contiguous CPU tensor of the same shape and dtype on all replicas.
            rank: The rank whose values are copied.

        Returns:
            `tensor`.
        """
        if self.size > 1:
            source = dist.get_global_rank(self.group, rank) if self.group is not None else rank
            sent = tensor.view(-1).view(torch.uint8)  # as bytes: gloo does not support every dtype
            self.wait(Posted(sent, self._start(dist.broadcast, sent, src=source)))
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a CPU tensor over all replicas, in place."""
        if self.size > 1:
            self.wait(Posted(tensor, self._start(dist.all_reduce, tensor)))
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable `value` of each replica, in the order of ranks."""
        if self.size == 1:
            return [value]
        payload = torch.frombuffer(_pickle(value), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        sizes[self.rank] = payload.numel()
        self.wait(self.post_max(sizes))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device="cpu")
        padded[: payload.numel()] = payload
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        self.wait(Posted(padded, self._start(dist.all_gather, rows, padded)))
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def _start(self, collective: Any, *args: Any, **kwargs: Any) -> dist.Work:
        try:
            return collective(*args, group=self.group, async_op=True, **kwargs)
        except RuntimeError as error:
            raise self._connection_lost(error) from error


def gloo_channel(timeout: float = 300.0) -> Channel:
    """Open a channel over a new gloo group, separate from the user's collectives.

    Args:
        timeout: Longest wait for the other replicas, in seconds.

    Returns:
        A channel of all ranks, or of this process alone where there is no process group.

    Raises:
        UsageError: If a launcher (torchrun, srun, mpirun) started several processes but there is no process group.

    Note:
        Collective: call on every rank.
    """
    group: dist.ProcessGroup | None = None
    if not dist.is_initialized():
        check_alone(os.environ)
    if dist.is_initialized():
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
    return Channel(group, timeout=timeout)


class _Pickler(pickle.Pickler):
    """Pickler that writes tensors as bytes.

    torch pickles neither float8 nor unsigned integers of more than 8 bits.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized or value.is_meta:
            return NotImplemented
        if value.device.type != "cpu" or value.requires_grad:
            return NotImplemented
        dense = value.resolve_conj().resolve_neg().contiguous()
        return _from_bytes, (dense.view(-1).view(torch.uint8).numpy().tobytes(), value.dtype, tuple(value.shape))


def _pickle(value: Any) -> bytearray:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return bytearray(buffer.getbuffer())


def _from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
