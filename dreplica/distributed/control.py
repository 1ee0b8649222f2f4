"""The control group of a process group in a custom training loop.

All channels of one process group share one gloo group and one liveness monitor. They are kept in a dictionary with weak
keys, since a process group has no place for attributes: nothing is kept longer than the process group. The gloo group
is not registered with `torch.distributed`, so it neither depends on nor changes the process groups of the user, and all
its connections and threads end when it is dropped.
"""

import atexit
import ctypes
import logging
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dreplica.distributed.channel import Channel
from dreplica.distributed.launch.environment import check_alone
from dreplica.distributed.liveness.lost import Losses, Lost, ReplicaLost
from dreplica.distributed.liveness.monitor import LivenessMonitor
from dreplica.distributed.liveness.notes import Notes
from dreplica.distributed.liveness.wait_notice import FIRST_NOTICE_SECONDS
from dreplica.distributed.rank_names import name_ranks
from dreplica.errors import DreplicaError, UsageError

log = logging.getLogger(__name__)

_MAX_NAP_SECONDS = 0.2

_controls: "weakref.WeakKeyDictionary[dist.ProcessGroup, Control]" = weakref.WeakKeyDictionary()


def open_channel(group: dist.ProcessGroup | None = None, timeout: float = 300.0) -> Channel:
    """Open a channel that is separate from the user's collectives.

    Args:
        group: The process group of the replicas. Default: the default group, or this process alone without one.
        timeout: Longest wait for another replica, in seconds.

    Returns:
        A channel of all ranks of the group. `close` releases it and, with the last channel of the group, all that they
        share.

    Raises:
        UsageError: If a launcher started several processes but there is no process group, or if this process is not in
            `group`.
        ReplicaLost: If a replica did not open the channel in time.

    Note:
        Collective: open and close channels on every rank in the same order.
    """
    if not dist.is_initialized():
        check_alone(os.environ)
        return Channel(timeout=timeout)
    base = dist.group.WORLD if group is None else group
    if not isinstance(base, dist.ProcessGroup) or base.rank() < 0:
        raise UsageError("group: this process is not a member of the process group", code="not-in-group")
    if base.size() == 1:
        return Channel(base, timeout=timeout)
    for other, old in list(_controls.items()):
        if not _is_registered(other):
            old.release()
    control = _controls.get(base)
    if control is not None and control.monitor.losses is not None:
        control.release(keep_gloo=True)  # the replica that was lost may be there again
    if control is not None and control.gloo is None:
        control = None
    number, is_new = _meet(base, timeout, control)
    if control is None or is_new:
        if control is not None and not control.channels:
            control.release()
        control = _controls[base] = Control(base, number, timeout)
    return SharedChannel(control, timeout)


@contextmanager
def channel_of_body() -> Iterator[Channel]:
    """Open a channel for the body, and report an exception of this rank alone to the others."""
    channel = open_channel()
    try:
        yield channel
    except BaseException as error:
        channel.close(None if isinstance(error, DreplicaError) else error)
        raise
    channel.close()


class Control:
    """Gloo group and liveness monitor of a process group.

    Args:
        base: The process group of the user, of two ranks or more.
        number: A number that no other control group of this process group has.
        timeout: Longest wait for the connections, in seconds.

    Attributes:
        gloo: The gloo group, or None after the release.
        monitor: The liveness monitor.
        channels: The channels that are not closed.
        ranks: The ranks of the process group's members in the default one.
        works: Collectives of these channels, which may be in flight.
    """

    def __init__(self, base: dist.ProcessGroup, number: int, timeout: float) -> None:
        self.ranks, rank = dist.get_process_group_ranks(base), base.rank()
        ranks = self.ranks
        store = dist.PrefixStore(f"control/{number}", _store_of(base))
        launcher_holds_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self.channels: set[SharedChannel] = set()
        self.works: list[dist.Work] = []
        self.holds_store = dist.get_rank() == 0 and not launcher_holds_store
        self._base = weakref.ref(base)
        self._pid = os.getpid()
        self.gloo: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
            dist.PrefixStore("gloo", store), rank, len(ranks), timedelta(seconds=timeout)
        )
        self.monitor = LivenessMonitor(
            store,
            ranks[rank],
            len(ranks),
            holds_store=self.holds_store,
            ranks=ranks,
            announces=True,
            is_open=self._check_open,
            store_rank=None if launcher_holds_store else 0,
        )
        atexit.register(self._end)

    def release(self, keep_gloo: bool = False) -> None:
        """Stop the monitor and close the gloo group.

        Args:
            keep_gloo: Keep the gloo group until the process ends. Its destructor waits for collectives in flight.
        """
        gloo, self.gloo = self.gloo, None
        if gloo is None or self._pid != os.getpid():
            return
        atexit.unregister(self._end)
        if keep_gloo or not all(work.is_completed() for work in self.works):
            _leak(gloo)
        self.works.clear()
        for channel in self.channels:
            channel.detach()
        del gloo
        self.monitor.close()

    def _check_open(self) -> bool:
        """Return True while the user's process group exists. Release the control group once it does not."""
        if _is_registered(self._base()):
            return True
        self.release()
        return False

    def _end(self) -> None:
        """Report the end of this process to the others, and let nothing wait for them."""
        if self._pid != os.getpid():
            if self.gloo is not None:
                _leak(self.gloo)  # its destructor would wait for threads that a forked process does not have
            return
        if self.gloo is None:
            self.monitor.close()  # its thread may be in the middle of the release
            return
        is_over = self.monitor.losses is not None or all(channel.is_resting for channel in self.channels)
        if not is_over:
            self._report_end(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None))
        self.release(keep_gloo=self.monitor.losses is not None)
        self.monitor.close()  # its thread may have begun the release meanwhile

    def _report_end(self, error: BaseException | None) -> None:
        if error is None or isinstance(error, DreplicaError):  # such as Divergence, which all ranks raise
            self.monitor.report_end("ended")
            if self.holds_store:  # the others must read it while the store is there
                self.monitor.find_lost()
            return
        self.monitor.report_failure(error)
        if isinstance(error, KeyboardInterrupt):
            return
        # The error may be what another rank's end has caused in the user's own collectives.
        self.monitor.find_lost()
        losses = self.monitor.losses or Losses()
        others = tuple(item for item in losses.lost if not item.raised)
        if others:
            log.warning("a replica was lost before this one failed:\n%s", Losses(others).describe())


class SharedChannel(Channel):
    """Channel over a control group that other channels share.

    Attributes:
        is_resting: Whether its user needs no other replica any more.
    """

    def __init__(self, control: Control, timeout: float) -> None:
        super().__init__(control.gloo, control.monitor, timeout)
        self.ranks_of_job = control.ranks
        self.is_resting = False
        self._control = control
        control.channels.add(self)

    def progress(self, step: int) -> None:
        """Note that this replica has taken `step` steps, before it compares the last one."""
        super().progress(step)
        self.is_resting = False

    def rest(self) -> None:
        """Note that this replica waits for no other one until it calls `progress` again."""
        self.is_resting = True
        if all(channel.is_resting for channel in self._control.channels):
            self._control.monitor.rest(True)

    def close(self, error: BaseException | None = None) -> None:
        """Release the channel and, if it is the last one, the control group.

        Args:
            error: The exception with which only this replica fails, which is reported to the others.
        """
        control = self._control
        if self not in control.channels or control.gloo is None:
            return
        if error is not None and not isinstance(error, ReplicaLost) and control.monitor.losses is None:
            control.monitor.report_failure(error)
            if control.holds_store:  # the others must read it while the store is there
                control.monitor.find_lost()
        if len(control.channels) == 1:
            if error is None and not self.is_resting and control.monitor.losses is None:
                control.monitor.report_end("finished")
            control.release(keep_gloo=control.monitor.losses is not None)
        control.channels.discard(self)
        self.detach()

    def detach(self) -> None:
        """Drop the gloo group."""
        self._group = None

    def _start(self, collective: str, *args: object) -> dist.Work:
        works = [work for work in self._control.works if not work.is_completed()]
        self._control.works = [*works, super()._start(collective, *args)]
        return self._control.works[-1]


def _meet(base: dist.ProcessGroup, timeout: float, control: Control | None) -> tuple[int, bool]:
    """Wait until all ranks open a channel.

    Returns:
        A number that is the same on all ranks, and whether any rank needs a new control group.
    """
    rank, size, started = base.rank(), base.size(), time.monotonic()
    notes = Notes(_store_of(base))
    number = (notes.count("arrivals") - 1) // size
    notes.append(f"arrived/{number}", {"rank": rank})
    if control is None:
        notes.publish(f"new/{number}", {})
    if notes.count(f"ready/{number}") == size:
        notes.publish(f"open/{number}", {"new": notes.published(f"new/{number}") is not None})
    nap, notice = 0.001, 0
    while (answer := notes.published(f"open/{number}")) is None:
        seconds = time.monotonic() - started
        if control is not None and control.monitor.alarm.is_set() and control.monitor.join_check():
            raise control.monitor.replica_lost("another replica reported a failure", "alarm")
        if seconds > timeout:
            raise _absent(base, notes, number, timeout)
        if seconds > FIRST_NOTICE_SECONDS * 2**notice + (0.5 if rank else 0.0):
            notice += 1
            if notes.count(f"waits/{number}/{notice}") == 1:
                missing = name_ranks(_missing(base, notes, number), "replica")
                log.warning("waiting for %.0f s until an Agreement is created by %s", seconds, missing)
        time.sleep(nap)
        nap = min(2 * nap, _MAX_NAP_SECONDS)
    return number, answer["new"]


def _absent(base: dist.ProcessGroup, notes: Notes, number: int, timeout: float) -> ReplicaLost:
    losses = Losses(tuple(Lost(rank, "absent") for rank in _missing(base, notes, number)))
    return losses.error(dist.get_rank(), None, f"no response for {timeout:g} s (timeout)", "timeout", seconds=timeout)


def _missing(base: dist.ProcessGroup, notes: Notes, number: int) -> list[int]:
    """Return the global ranks that have not arrived."""
    arrived = {row["rank"] for row in notes.rows(f"arrived/{number}")}
    return [each for i, each in enumerate(dist.get_process_group_ranks(base)) if i not in arrived]


def _store_of(base: dist.ProcessGroup) -> dist.Store:
    return dist.PrefixStore(f"dreplica/{base.group_name}", distributed_c10d._get_default_store())


def _is_registered(group: dist.ProcessGroup | None) -> bool:
    """Return True unless the process group was destroyed."""
    try:
        return group is not None and bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


def _leak(gloo: dist.ProcessGroupGloo) -> None:
    """Keep a gloo group until the process has ended.

    Its destructor waits until all collectives in flight are completed or time out, and gloo cannot abort them. The
    interpreter must not run it at exit either, so one reference is never given back.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(gloo))
