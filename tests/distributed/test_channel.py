"""The control channel: its collectives, and how they end on the survivors when a replica is lost."""

import os
import re
import signal
import time
from typing import Any

import pytest
import torch

from dreplica.distributed.channel import Channel
from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness import check as liveness_check
from dreplica.distributed.liveness.lost import Lost, ReplicaLost
from dreplica.distributed.liveness.monitor import find_lost_replicas
from dreplica.distributed.messages import BadMessage
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

HANG_SECONDS = 25.0
"""A survivor that has not detected a loss by then hangs."""


def gathers(world: World) -> list[Any]:
    rank = world.replica_id
    unequal = world.channel.gather("x" * (3_000_000 * rank))
    objects = world.channel.gather({"rank": rank, "tensor": torch.full((rank,), rank), "none": None})
    return [[len(text) for text in unequal], [(row["rank"], row["tensor"].tolist()) for row in objects]]


def test_gather_returns_objects_in_rank_order() -> None:
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


def sends_unsendable(world: World) -> str:
    with pytest.raises(BadMessage) as caught:
        world.channel.gather(print if world.replica_id == 1 else None)
    return str(caught.value)


def test_a_value_that_cannot_be_sent_fails_on_all() -> None:
    expected = "replica 1: cannot send this to the other replicas: it contains a builtins.builtin_function_or_method"
    assert run_replicas(sends_unsendable, 2) == [expected] * 2


def test_channel_sends_tensors_of_any_dtype() -> None:
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


def test_channel_reduces_and_broadcasts() -> None:
    assert run_replicas(reduces, 3) == [[[7, 0], [3, 111], [2, 0], [10]]] * 3


def test_channel_of_one_replica_works() -> None:
    channel = Channel()
    assert (channel.rank, channel.size) == (0, 1)
    assert channel.gather("a") == ["a"]
    assert channel.broadcast(torch.tensor([3])).tolist() == [3]
    assert channel.sum(torch.tensor([3])).tolist() == [3]
    assert channel.wait(channel.post_max(torch.tensor([3]))).tolist() == [3]


def wait_for_lost(world: World, channel: Channel) -> None:
    """Wait for a replica that was lost, and raise `ReplicaLost` with the lost replicas."""
    started = time.monotonic()
    with pytest.raises(ReplicaLost) as caught:
        channel.gather(None)
    find_lost_replicas(world.monitor, caught.value)
    assert time.monotonic() - started < HANG_SECONDS
    raise caught.value


def loses(world: World, lost: int, how: str, timeout: float) -> None:
    """Lose the replica `lost` in one of several ways, while the others wait for it."""
    channel = Channel(None, world.monitor, timeout)
    assert world.monitor is not None
    liveness_check._ANSWER_SECONDS = 2.0
    pids = channel.gather(os.getpid())
    world.monitor.step = 6
    if world.replica_id != lost:
        try:
            wait_for_lost(world, channel)
        finally:
            if how in {"stopped", "sleeps", "computes"} and world.replica_id == (lost + 1) % world.num_replicas:
                time.sleep(1)  # until the other survivors have asked it, too
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


def errors_of_survivors(num_replicas: int, lost: int, how: str, timeout: float = 60.0) -> list[ReplicaLost]:
    results = run_replicas(loses, num_replicas, lost, how, timeout, timeout=HANG_SECONDS + 10)
    survivors = [result for replica_id, result in enumerate(results) if replica_id != lost]
    assert [type(result) for result in survivors] == [ReplicaLost] * (num_replicas - 1), results
    return survivors


@pytest.mark.parametrize(
    ("num_replicas", "lost", "how"), [(4, 2, "killed"), (3, 0, "killed"), (2, 1, "killed"), (3, 1, "exits")]
)
def test_survivors_name_the_replica_that_died(num_replicas: int, lost: int, how: str) -> None:
    for error in errors_of_survivors(num_replicas, lost, how):
        assert (error.fields["ranks"], error.fields["reasons"]) == ([lost], {lost: "no-response"})


def test_survivors_know_what_the_lost_replica_raised() -> None:
    for error in errors_of_survivors(3, 1, "raises"):
        assert error.lost == (Lost(1, "raised", 6, Failure("ArithmeticError", "the sky fell")),)
        assert error.lost[0].reason == "raised ArithmeticError: the sky fell"


@pytest.mark.parametrize("how", ["sleeps", "computes"])
def test_hanging_replica_is_lost_after_the_timeout(how: str) -> None:
    for error in errors_of_survivors(3, 1, how, timeout=1.0):
        (lost,) = error.lost
        assert (lost.replica_id, lost.code, lost.step) == (1, "hung", 6)
        assert re.fullmatch(r"tests/distributed/test_channel.py:\d+ in loses", lost.stack[-1])
        assert lost.reason.startswith(f"hangs after step 6 at {lost.stack[-1]}: ")
        assert str(error).startswith(f"replica 1: {lost.reason}\nstack of replica 1, innermost last:\n")


def waits_without_a_monitor(world: World, how: str) -> None:
    channel = Channel(None, timeout=1.0)
    channel.gather(None)
    if world.replica_id == 1:
        if how == "exits":
            os._exit(0)
        time.sleep(3)
    else:
        channel.gather(None)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("exits", "connection-lost", "lost the connection to another replica ("),
        (
            "sleeps",
            "timeout",
            "no response from another replica for 1 s: it hangs, or it skipped a comparison",
        ),
    ],
)
def test_without_a_monitor_the_error_says_where_to_look(how: str, code: str, words: str) -> None:
    error = run_replicas(waits_without_a_monitor, 2, how)[0]
    assert isinstance(error, ReplicaLost)
    assert (error.code, error.fields["ranks"]) == (code, [])
    assert str(error).startswith(words)


def test_suspended_replica_is_lost_after_the_timeout() -> None:
    for error in errors_of_survivors(3, 0, "stopped", timeout=1.0):
        (lost,) = error.lost
        assert (lost.replica_id, lost.code, lost.step) == (0, "no-response", None)
        assert lost.silent is not None
        assert lost.silent >= 1
        assert lost.reason.startswith("no heartbeat for ")


def busy_survivor(world: World) -> None:
    """Kill replica 2 while replica 1 computes: replica 0 raises the alarm, and replica 1 must be able to answer."""
    assert world.monitor is not None
    liveness_check._ANSWER_SECONDS = 2.0
    world.channel.gather(None)
    if world.replica_id == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    while world.replica_id == 1 and time.monotonic() < started + 4:
        torch.mm(torch.ones(500, 500), torch.ones(500, 500))
    wait_for_lost(world, world.channel)


def test_busy_replica_responds_to_the_alarm() -> None:
    zero, one, _ = run_replicas(busy_survivor, 3)
    assert zero.fields["ranks"] == one.fields["ranks"] == [2]


def leaves_early(world: World) -> None:
    if world.replica_id == 1:
        raise KeyboardInterrupt
    world.channel.gather(None)


def test_interrupt_is_reported_to_the_others() -> None:
    zero, one = run_replicas(leaves_early, 2, timeout=HANG_SECONDS)
    assert isinstance(zero, ReplicaLost)
    assert isinstance(one, KeyboardInterrupt)


def posts_then_fails(world: World) -> None:
    """Fail on replica 0 with a collective in flight that replica 1 never completes."""
    world.channel.gather(None)
    if world.replica_id == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    world.channel.post_max(torch.zeros(5))
    raise ArithmeticError("with a pending maximum")


def test_failure_does_not_wait_for_a_collective_in_flight() -> None:
    zero, _ = run_replicas(posts_then_fails, 2, timeout=8)  # then both are killed
    assert isinstance(zero, ArithmeticError)
