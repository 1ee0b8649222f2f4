"""Joining, standing alone, and failing together."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from dreplica.config.schema import WorldConfig
from dreplica.distributed import liveness
from dreplica.distributed.liveness import LivenessMonitor, ReplicaLost
from dreplica.distributed.process_group import World, env_num_replicas, env_rank, open_world
from dreplica.environment.device import bind_device
from dreplica.errors import SharedUsageError, UsageError
from tests.harness import run_replicas


def fails_on(world: World, failing: list[int]) -> str:
    def action() -> str:
        if world.replica_id in failing:
            raise UsageError(f"optim.lr: not on {world.replica_id}")
        return f"done by {world.replica_id}"

    return world.together(action)


def test_together_returns_each_replicas_own_result() -> None:
    assert run_replicas(fails_on, 3, []) == ["done by 0", "done by 1", "done by 2"]


def test_a_usage_error_on_one_replica_is_raised_on_all_and_names_it() -> None:
    results = run_replicas(fails_on, 3, [1], timeout=20)
    assert [type(result) for result in results] == [SharedUsageError] * 3
    assert {str(result) for result in results} == {"replica 1: optim.lr: not on 1"}


def test_a_usage_error_on_all_replicas_names_none() -> None:
    results = run_replicas(fails_on, 2, [0, 1], timeout=20)
    assert {str(result) for result in results} == {"optim.lr: not on 0"}


def lonely_usage_error(world: World) -> None:
    if world.replica_id == 1:
        raise UsageError("data.root: a broken image")
    with pytest.raises(ReplicaLost):
        world.channel.gather(None)
    assert world.monitor is not None
    raise ReplicaLost(str([(item.replica_id, item.reason) for item in world.monitor.find_lost()]))


def test_a_usage_error_outside_of_together_does_not_leave_the_others_waiting() -> None:
    zero, one, two = run_replicas(lonely_usage_error, 3, timeout=20)
    assert type(one) is UsageError
    for result in (zero, two):
        assert str(result) == "[(1, 'it raised UsageError: data.root: a broken image')]"


def test_without_a_launcher_there_is_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left over from something else
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


def test_device_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("num_gpus", "advice"), [(0, "Use --world.device auto"), (1, "Start no more than 1 replicas here, or use --world")]
)
def test_device_cuda_wants_a_gpu_for_each_replica(monkeypatch: pytest.MonkeyPatch, num_gpus: int, advice: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError) as caught:
        bind_device(WorldConfig(device="cuda"))
    assert str(caught.value).startswith("world.device: 'cuda' wants a GPU for each of the 2 replicas on this node")
    assert advice in str(caught.value)


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0)])
def test_device_auto_shares_gpus_and_says_so(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    bound = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cuda", index), True)
    assert bound == [torch.device("cuda", index)]


def test_the_world_leaves_no_thread_and_no_group_behind() -> None:
    assert run_replicas(threads_within, 2) == [["dreplica-liveness"]] * 2


def threads_within(world: World) -> list[str]:
    assert world.monitor is not None
    before = [thread.name for thread in threading.enumerate() if thread.name.startswith("dreplica")]
    world.monitor.close()
    assert not any(thread.name.startswith("dreplica") for thread in threading.enumerate())
    return before


def serve(ready: "os.PathLike[str]") -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with open(f"{ready}.part", "w") as file:
        file.write(str(store.port))
    os.rename(f"{ready}.part", ready)
    time.sleep(600)


@pytest.mark.parametrize(("how", "reason"), [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "does not respond")])
def test_when_the_store_goes_its_holder_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: "os.PathLike[str]", how: signal.Signals, reason: str
) -> None:
    """Without torchrun rank 0 holds the store. Whoever asks a store whose process stands still waits for good."""
    from tests.harness import _CONTEXT

    monkeypatch.setattr(liveness, "_ANSWER_SECONDS", 0.5)
    port = os.path.join(tmp_path, "port")
    holder = _CONTEXT.Process(target=serve, args=(port,), daemon=True)
    holder.start()
    try:
        while not os.path.exists(port):
            time.sleep(0.01)
        with open(port) as file:
            monitor = LivenessMonitor(dist.TCPStore("127.0.0.1", int(file.read())), 1, 2)
        os.kill(holder.pid, how)
        (lost,) = monitor.find_lost()
        assert lost.replica_id == 0
        assert reason in lost.reason
        assert "\n" not in lost.reason
        monitor.close()
    finally:
        holder.kill()
        holder.join()


def test_the_holder_of_the_store_stays_until_the_others_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitors = [LivenessMonitor(store, replica_id, 3, holds_store=replica_id == 0) for replica_id in range(3)]
    monitors[2].report_failure("it fell")
    found: list[object] = []
    holder = threading.Thread(target=lambda: found.append(monitors[0].find_lost()))
    holder.start()
    holder.join(1.5)
    assert holder.is_alive()
    assert [item.replica_id for item in monitors[1].find_lost()] == [2]
    monitors[2].find_lost()
    holder.join(3)
    assert not holder.is_alive()
    assert [(item.replica_id, item.reason) for item in found[0]] == [(2, "it fell")]  # type: ignore[attr-defined]
    for monitor in monitors:
        monitor.close()


def test_only_the_first_to_fail_is_told_so() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitors = [LivenessMonitor(store, replica_id, 2) for replica_id in range(2)]
    assert [monitor.report_failure("it fell") for monitor in monitors] == [True, False]
    for monitor in monitors:
        monitor.close()


def _stuck(world: World, last_seconds: float | None) -> str:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitor = LivenessMonitor(store, 0, 2, last_seconds=last_seconds)
    monitor.report_failure("the alarm")
    time.sleep(3)
    return "still there"


def test_a_process_that_is_stuck_when_the_run_is_over_is_ended() -> None:
    assert run_replicas(_stuck, 1, None) == ["still there"]
    assert run_replicas(_stuck, 1, 0.5) == [None]
