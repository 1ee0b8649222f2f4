"""Rendezvous, a run of one process, and errors that all replicas raise together."""

import threading

import pytest
import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.lost import Lost, ReplicaLost
from dreplica.distributed.liveness.monitor import find_lost_replicas
from dreplica.distributed.process_group import World, env_num_replicas, env_rank, open_world
from dreplica.errors import SharedUsageError, UsageError
from tests.harness import run_replicas


def fails_on(world: World, failing: list[int]) -> str:
    def action() -> str:
        if world.replica_id in failing:
            raise UsageError(
                f"optim.lr: not on {world.replica_id}", code="bad-lr", key="optim.lr", values=(1, {2: "a"})
            )
        return f"done by {world.replica_id}"

    return world.together(action)


def test_together_returns_each_replicas_result() -> None:
    assert run_replicas(fails_on, 3, []) == ["done by 0", "done by 1", "done by 2"]


def test_together_raises_one_replicas_error_on_all() -> None:
    results = run_replicas(fails_on, 3, [1], timeout=20)
    assert [type(result) for result in results] == [SharedUsageError] * 3
    assert {str(result) for result in results} == {"replica 1: optim.lr: not on 1"}
    for result in results:
        assert result.code == "bad-lr"
        assert result.fields == {"key": "optim.lr", "values": [1, {"2": "a"}], "replicas": [1]}


def test_together_names_no_replica_if_all_fail() -> None:
    results = run_replicas(fails_on, 2, [0, 1], timeout=20)
    assert {str(result) for result in results} == {"optim.lr: not on 0"}
    assert [result.fields["replicas"] for result in results] == [[0, 1]] * 2


def lonely_usage_error(world: World) -> None:
    if world.replica_id == 1:
        raise UsageError("data.root: a broken image", code="broken-image", path="a.png")
    with pytest.raises(ReplicaLost) as caught:
        world.channel.gather(None)
    find_lost_replicas(world.monitor, caught.value)
    raise caught.value


def test_usage_error_outside_together_is_reported() -> None:
    """The other replicas do not wait, and know the error's data."""
    zero, one, two = run_replicas(lonely_usage_error, 3, timeout=20)
    assert type(one) is UsageError
    failure = Failure("UsageError", "data.root: a broken image", "broken-image", {"path": "a.png"})
    for result in (zero, two):
        assert result.lost == (Lost(1, "raised", failure=failure),)
        assert result.lost[0].reason == "raised UsageError: data.root: a broken image"


def test_world_without_a_launcher_is_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script, which Slurm runs once
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (env_rank(), env_num_replicas()) == (0, 1)
    with open_world(timeout=1) as world:
        assert (world.replica_id, world.num_replicas, world.is_coordinator) == (0, 1, True)
        assert world.monitor is None
        assert not dist.is_initialized()
        assert world.together(lambda: "alone") == "alone"
        with pytest.raises(SharedUsageError, match=r"^no$"):
            world.together(lambda: fail("no"))


def fail(message: str) -> None:
    raise UsageError(message)


def test_world_leaves_no_thread_behind() -> None:
    assert run_replicas(threads_within, 2) == [["dreplica-liveness"]] * 2


def threads_within(world: World) -> list[str]:
    assert world.monitor is not None
    before = [thread.name for thread in threading.enumerate() if thread.name.startswith("dreplica")]
    world.monitor.close()
    assert not any(thread.name.startswith("dreplica") for thread in threading.enumerate())
    return before
