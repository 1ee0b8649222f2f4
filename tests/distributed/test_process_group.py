"""Rendezvous, a run of one process, and errors that all replicas raise together."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from dreplica.config.schema import WorldConfig
from dreplica.distributed import liveness
from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness import LivenessMonitor, Lost, ReplicaLost, find_lost_replicas
from dreplica.distributed.process_group import World, env_num_replicas, env_rank, open_world
from dreplica.environment.device import bind_device
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


def test_device_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("num_gpus", "advice"),
    [(0, "Use --world.device auto"), (1, "Start at most 1 replicas on this node, or use --world")],
)
def test_device_cuda_requires_a_gpu_per_replica(monkeypatch: pytest.MonkeyPatch, num_gpus: int, advice: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError) as caught:
        bind_device(WorldConfig(device="cuda"))
    assert str(caught.value).startswith("world.device: 'cuda' requires one GPU for each of the 2 replicas on this node")
    assert advice in str(caught.value)


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0)])
def test_device_auto_shares_gpus(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    bound = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cuda", index), True)
    assert bound == [torch.device("cuda", index)]


def test_world_leaves_no_thread_behind() -> None:
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


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, "store-lost"), (signal.SIGSTOP, "store-no-response")])
def test_lost_store_names_the_replica_that_serves_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: "os.PathLike[str]", how: signal.Signals, code: str
) -> None:
    """Without torchrun rank 0 serves the store. A request to a store whose process is suspended never returns."""
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
        assert (lost.replica_id, lost.code) == (0, code)
        assert "\n" not in lost.reason
        monitor.close()
    finally:
        holder.kill()
        holder.join()


def test_replica_with_the_store_waits_for_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitors = [LivenessMonitor(store, replica_id, 3, holds_store=replica_id == 0) for replica_id in range(3)]
    monitors[2].report_failure(ArithmeticError("it fell"))
    found: list[object] = []
    holder = threading.Thread(target=lambda: found.append(monitors[0].find_lost()))
    holder.start()
    holder.join(1.5)
    assert holder.is_alive()
    assert [item.replica_id for item in monitors[1].find_lost()] == [2]
    monitors[2].find_lost()
    holder.join(3)
    assert not holder.is_alive()
    assert found[0] == [Lost(2, "raised", failure=Failure("ArithmeticError", "it fell"))]
    for monitor in monitors:
        monitor.close()


def test_report_failure_is_true_for_the_first_only() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitors = [LivenessMonitor(store, replica_id, 2) for replica_id in range(2)]
    assert [monitor.report_failure(ArithmeticError("it fell")) for monitor in monitors] == [True, False]
    for monitor in monitors:
        monitor.close()


def _stuck(world: World, last_seconds: float | None) -> str:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitor = LivenessMonitor(store, 0, 2, last_seconds=last_seconds)
    monitor.report_failure(ArithmeticError("the alarm"))
    time.sleep(3)
    return "still there"


def test_stuck_process_is_ended_after_an_alarm() -> None:
    assert run_replicas(_stuck, 1, None) == ["still there"]
    assert run_replicas(_stuck, 1, 0.5) == [None]
