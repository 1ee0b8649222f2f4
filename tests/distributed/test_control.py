"""Channels over the process groups of users."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from dreplica.distributed.control import open_channel
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.harness import run_replicas


def resources() -> tuple[int, list[str]]:
    """Return the number of open files and the names of the threads of this process."""
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


def returns_to(before: tuple[int, list[str]]) -> bool:
    """Return True once the resources are as before. The store closes the connections of others a little later."""
    end = time.monotonic() + 5
    while resources() != before and time.monotonic() < end:
        time.sleep(0.05)
    return resources() == before


def test_channel_without_a_process_group_has_one_replica() -> None:
    channel = open_channel()
    assert (channel.rank, channel.size, channel.gather("a")) == (0, 1, ["a"])
    channel.close()


def test_launch_without_a_process_group_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="no process group"):
        open_channel()


def shares(world: World) -> bool:
    before = resources()
    first = open_channel(timeout=20)
    threads = threading.active_count()
    second = open_channel(timeout=20)
    assert threading.active_count() == threads
    assert first.gather(world.replica_id) == second.gather(world.replica_id) == [0, 1]
    first.close()
    first.close()
    assert second.gather("x") == ["x"] * 2
    with pytest.raises(UsageError, match="closed"):
        first.gather("x")
    second.close()
    assert returns_to(before)
    third = open_channel(timeout=20)
    assert third.broadcast(torch.tensor([world.replica_id + 7])).tolist() == [7]
    third.close()
    return returns_to(before)


def test_channels_share_one_control_group() -> None:
    assert run_replicas(shares, 2) == [True] * 2


def opens_many(world: World, count: int) -> bool:
    before = resources()
    for i in range(count):
        channel = open_channel(timeout=20)
        assert channel.gather(i) == [i, i]
        channel.close()
    return returns_to(before)


def test_closed_channels_leave_nothing_behind() -> None:
    assert run_replicas(opens_many, 2, 20) == [True] * 2


def of_a_subgroup(world: World) -> list[int]:
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    with pytest.raises(UsageError, match="not a member"):
        open_channel(groups[1 - world.replica_id % 2])
    channel = open_channel(groups[world.replica_id % 2], timeout=20)
    gathered = channel.gather(world.replica_id)
    channel.close()
    return gathered


def test_channel_of_a_subgroup_has_its_ranks() -> None:
    assert run_replicas(of_a_subgroup, 3) == [[0, 2], [1], [0, 2]]
