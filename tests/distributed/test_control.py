"""Channels over the process groups of users."""

import atexit
import gc
import logging.handlers
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dreplica.distributed.control import open_channel
from dreplica.distributed.liveness.lost import Lost, ReplicaLost
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.harness import run_replicas, run_scripts


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


def initialize(folder: Path, name: str, rank: int, num_ranks: int = 2) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=num_ranks)


def destroys_first(rank: int, folder: Path, keeps_group: bool) -> list[Any]:
    """Destroy the process group while a channel is open, and initialize another one."""
    before = resources()
    initialize(folder, "first", rank)
    group = dist.group.WORLD if keeps_group else None  # as a model in DistributedDataParallel does
    channel = open_channel(timeout=20)
    assert channel.gather(rank) == [0, 1]
    dist.destroy_process_group()
    ended = "dreplica-liveness" not in [thread.name for thread in threading.enumerate()]
    for _ in range(100):
        ended = ended or "dreplica-liveness" not in [thread.name for thread in threading.enumerate()]
        time.sleep(0.05)
    with pytest.raises(UsageError, match="destroyed"):
        channel.gather(rank)
    channel.close()
    initialize(folder, "second", rank)
    other = open_channel(timeout=20)
    gathered = other.gather(-rank)
    channel.close()
    gathered += other.gather("again")
    other.close()
    dist.destroy_process_group()
    del group
    gc.collect()
    return [ended, gathered, returns_to(before)]


@pytest.mark.parametrize("keeps_group", [False, True])
def test_channel_ends_with_its_process_group(tmp_path: Path, keeps_group: bool) -> None:
    results = run_scripts(destroys_first, 2, tmp_path, keeps_group)
    assert results == [[True, [0, -1, "again", "again"], True]] * 2


def closes_after_destruction(rank: int, folder: Path) -> bool:
    before = resources()
    initialize(folder, "store", rank)
    channel = open_channel(timeout=20)
    dist.destroy_process_group()
    channel.close()
    return returns_to(before)


def test_channel_closes_after_its_process_group(tmp_path: Path) -> None:
    assert run_scripts(closes_after_destruction, 2, tmp_path) == [True, True]


def forgets_one(rank: int, folder: Path) -> list[Any]:
    """Close a channel on one rank only. Then that rank has no control group, and both need a new one."""
    initialize(folder, "store", rank)
    first = open_channel(timeout=20)
    first.gather(None)
    if rank == 0:
        first.close()
    second = open_channel(timeout=20)
    gathered = second.gather(rank)
    first.close()
    second.close()
    return gathered


def test_control_group_is_renewed_on_all_ranks(tmp_path: Path) -> None:
    assert run_scripts(forgets_one, 2, tmp_path) == [[0, 1]] * 2


def comes_late(rank: int, folder: Path) -> Any:
    initialize(folder, "store", rank, 3)
    if rank == 2:
        time.sleep(8)
        return None
    lines = logging.handlers.BufferingHandler(100)
    logging.getLogger("dreplica").addHandler(lines)
    with pytest.raises(ReplicaLost) as caught:
        open_channel(timeout=6)
    return caught.value, [line.getMessage() for line in lines.buffer]


def test_rank_that_opens_no_channel_is_named(tmp_path: Path) -> None:
    (error, lines), (same_error, no_lines), _ = run_scripts(comes_late, 3, tmp_path)
    assert (lines, no_lines) == (["waiting for 5 s until an Agreement is created by replica 2"], [])
    for each in (error, same_error):
        assert each.lost == (Lost(2, "absent"),)
        assert str(each).startswith("replica 2: did not create its Agreement, ")


def recovers(rank: int, folder: Path) -> list[Any]:
    """Wait for a rank that hangs for a while, and open another channel once it is there again."""
    initialize(folder, "store", rank)
    first, unused = open_channel(timeout=2), open_channel(timeout=2)
    first.gather(None)
    if rank == 1:
        time.sleep(6)
    with pytest.raises(ReplicaLost) as caught:
        first.gather(None)
    first.close()
    second = open_channel(timeout=20)
    gathered = second.gather(rank)
    second.close()
    unused.close()
    return [[item.replica_id for item in caught.value.lost], gathered]


def test_channel_can_be_opened_again_after_a_loss(tmp_path: Path) -> None:
    assert run_scripts(recovers, 2, tmp_path) == [[[1], [0, 1]]] * 2


def forks(rank: int, folder: Path) -> list[Any]:
    """Fork a child that ends as an interpreter does, while the process group is in use."""
    initialize(folder, "store", rank)
    channel = open_channel(timeout=10)
    channel.gather(None)
    child = os.fork()
    if child == 0:
        try:
            atexit._run_exitfuncs()
            channel.close()
            del channel
            gc.collect()
        finally:
            os._exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(1)
    gathered = channel.gather(rank)
    channel.close()
    return [code, gathered]


def test_forked_child_does_not_disturb_the_channel(tmp_path: Path) -> None:
    assert run_scripts(forks, 2, tmp_path) == [[7, [0, 1]]] * 2
