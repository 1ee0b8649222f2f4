"""Collectives, and how they end when a replica is gone: with its name, on every survivor."""

import os
import signal
import time
from typing import Any

import pytest
import torch

from dreplica.distributed import liveness
from dreplica.distributed.channel import Channel
from dreplica.distributed.liveness import ReplicaLost
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

HANG_SECONDS = 25.0
"""A survivor that has not learned of a loss by then never will."""


def gathers(world: World) -> list[Any]:
    rank = world.replica_id
    unequal = world.channel.gather("x" * (3_000_000 * rank))
    objects = world.channel.gather({"rank": rank, "tensor": torch.full((rank,), rank), "none": None})
    return [[len(text) for text in unequal], [(row["rank"], row["tensor"].tolist()) for row in objects]]


def test_gather_brings_unequal_and_large_objects_in_the_order_of_ranks() -> None:
    expected = [[0, 3_000_000, 6_000_000], [(0, []), (1, [1]), (2, [2, 2])]]
    assert run_replicas(gathers, 3) == [expected] * 3


UNUSUAL = {
    "float8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 65535]).to(torch.uint16),
    "uint64": torch.tensor([1, -1]).view(torch.uint64),
    "bool": torch.tensor([[True], [False]]),
    "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j, -0.0 - 1j]).conj(),
    "transposed": torch.arange(6).reshape(2, 3).t(),
    "sparse": torch.tensor([[0.0, 2.0]]).to(torch.float8_e5m2).float().to_sparse(),
    "empty": torch.zeros(0, 2, dtype=torch.uint32),
}


def sends_unusual(world: World) -> tuple[list[Any], list[Any]]:
    gathered = world.channel.gather(UNUSUAL if world.replica_id == 1 else None)[1]
    sent = []
    for tensor in UNUSUAL.values():
        if tensor.layout is torch.strided:
            own = (
                tensor.contiguous().clone() if world.replica_id == 0 else torch.zeros(tensor.shape, dtype=tensor.dtype)
            )
            sent.append(described(world.channel.broadcast(own)))
    return [described(tensor) for tensor in gathered.values()], sent


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    dense = tensor.to_dense().resolve_conj().contiguous()
    return tensor.dtype, tensor.layout, tuple(tensor.shape), dense.view(-1).view(torch.uint8).tolist()


def test_tensors_of_any_dtype_can_be_sent() -> None:
    everything = [described(tensor) for tensor in UNUSUAL.values()]
    dense = [row for row in everything if row[1] is torch.strided]
    assert run_replicas(sends_unusual, 2) == [(everything, dense)] * 2


def reduces(world: World) -> list[Any]:
    rank, channel = world.replica_id, world.channel
    broadcast = channel.broadcast(torch.tensor([rank + 7, rank]))
    total = channel.sum(torch.tensor([1, 10**rank]))
    one = channel.post_max(torch.tensor([rank, -rank]))
    two = channel.post_max(torch.tensor([rank * 5]))
    return [tensor.tolist() for tensor in (broadcast, total, channel.wait(one), channel.wait(two))]


def test_broadcast_sum_and_posted_maxima() -> None:
    assert run_replicas(reduces, 3) == [[[7, 0], [3, 111], [2, 0], [10]]] * 3


def test_a_channel_of_one_replica_talks_to_itself() -> None:
    channel = Channel()
    assert (channel.rank, channel.size) == (0, 1)
    assert channel.gather("a") == ["a"]
    assert channel.broadcast(torch.tensor([3])).tolist() == [3]
    assert channel.sum(torch.tensor([3])).tolist() == [3]
    assert channel.wait(channel.post_max(torch.tensor([3]))).tolist() == [3]


class Missed(ReplicaLost):
    """Carries whom a survivor misses out of a world that is no longer whole."""


def miss(world: World, channel: Channel) -> None:
    """Waits for one that will not come, and raises `Missed` with (replica id, reason) of each that is lost."""
    assert world.monitor is not None
    started = time.monotonic()
    with pytest.raises(ReplicaLost):
        channel.gather("who else?")
    lost = world.monitor.find_lost()
    assert time.monotonic() - started < HANG_SECONDS
    raise Missed([(item.replica_id, item.reason) for item in lost])


def loses(world: World, lost: int, how: str, timeout: float) -> None:
    """Replica `lost` goes in one of several ways; the others wait for it."""
    channel = Channel(None, world.monitor, timeout)
    assert world.monitor is not None
    liveness._ANSWER_SECONDS = 2.0
    pids = channel.gather(os.getpid())
    world.monitor.step = 6
    if world.replica_id != lost:
        try:
            miss(world, channel)
        finally:
            if how in {"stopped", "sleeps", "computes"} and world.replica_id == (lost + 1) % world.num_replicas:
                time.sleep(1)  # the other survivors have asked it, too
                os.kill(pids[lost], signal.SIGKILL)
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exits":
            os._exit(0)
        case "raises":
            raise ArithmeticError("the sky fell")
        case "sleeps":
            time.sleep(600)
        case "computes":
            while True:
                torch.mm(torch.ones(300, 300), torch.ones(300, 300))


def missed_by_survivors(num_replicas: int, lost: int, how: str, timeout: float = 60.0) -> list[list[tuple[int, str]]]:
    results = run_replicas(loses, num_replicas, lost, how, timeout, timeout=HANG_SECONDS + 10)
    survivors = [result for replica_id, result in enumerate(results) if replica_id != lost]
    assert [type(result) for result in survivors] == [Missed] * (num_replicas - 1), results
    return [result.args[0] for result in survivors]


@pytest.mark.parametrize(
    ("num_replicas", "lost", "how"), [(4, 2, "killed"), (3, 0, "killed"), (2, 1, "killed"), (3, 1, "exits")]
)
def test_all_survivors_name_exactly_the_replica_that_died(num_replicas: int, lost: int, how: str) -> None:
    for missed in missed_by_survivors(num_replicas, lost, how):
        assert [replica_id for replica_id, _ in missed] == [lost]
        assert "ended without a word" in missed[0][1]


def test_all_survivors_know_what_the_lost_replica_raised() -> None:
    assert missed_by_survivors(3, 1, "raises") == [[(1, "it raised ArithmeticError: the sky fell")]] * 2


@pytest.mark.parametrize("how", ["sleeps", "computes"])
def test_a_silent_replica_counts_as_lost_after_the_timeout(how: str) -> None:
    for missed in missed_by_survivors(3, 1, how, timeout=1.0):
        assert missed == [(1, "it is alive but stuck after step 6 while the others wait for it")]


def waits_without_a_monitor(world: World, how: str) -> None:
    channel = Channel(None, timeout=1.0)
    channel.gather(None)
    if world.replica_id == 1:
        if how == "exits":
            os._exit(0)
        time.sleep(3)
    else:
        channel.gather("who else?")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exits", "another replica is gone, and its own output says why ("),
        ("sleeps", "no answer for 1 s from another replica: it hangs, or has left out a comparison in which this one"),
    ],
)
def test_without_a_monitor_it_is_said_where_to_look(how: str, words: str) -> None:
    lost = run_replicas(waits_without_a_monitor, 2, how)[0]
    assert isinstance(lost, ReplicaLost)
    assert str(lost).startswith(words)


def test_a_replica_that_stands_still_counts_as_lost_after_the_timeout() -> None:
    for missed in missed_by_survivors(3, 0, "stopped", timeout=1.0):
        assert [replica_id for replica_id, _ in missed] == [0]
        assert "does not respond" in missed[0][1]


def busy_witness(world: World) -> None:
    """Replica 2 dies while replica 1 computes: 0 asks, and 1 must be able to answer."""
    assert world.monitor is not None
    liveness._ANSWER_SECONDS = 2.0
    world.channel.gather(None)
    if world.replica_id == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    while world.replica_id == 1 and time.monotonic() < started + 4:
        torch.mm(torch.ones(500, 500), torch.ones(500, 500))
    miss(world, world.channel)


def test_a_replica_busy_with_a_long_computation_responds() -> None:
    zero, one, _ = run_replicas(busy_witness, 3)
    assert [replica_id for replica_id, _ in zero.args[0]] == [2]
    assert [replica_id for replica_id, _ in one.args[0]] == [2]


def leaves_early(world: World) -> None:
    if world.replica_id == 1:
        raise KeyboardInterrupt
    world.channel.gather(None)


def test_an_interrupt_is_told_to_the_others() -> None:
    zero, one = run_replicas(leaves_early, 2, timeout=HANG_SECONDS)
    assert isinstance(zero, ReplicaLost)
    assert isinstance(one, KeyboardInterrupt)


def posts_then_fails(world: World) -> None:
    """Replica 0 fails with a collective under way that replica 1 never completes."""
    world.channel.gather(None)
    if world.replica_id == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    world.channel.post_max(torch.zeros(5))
    raise ArithmeticError("with a pending maximum")


def test_failing_with_a_collective_under_way_does_not_wait_for_its_end() -> None:
    zero, _ = run_replicas(posts_then_fails, 2, timeout=8)  # both are killed when it is over
    assert isinstance(zero, ArithmeticError)
