"""The liveness monitor, and its report of lost replicas."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness import check as liveness_check
from dreplica.distributed.liveness import monitor as liveness
from dreplica.distributed.liveness.lost import Lost
from dreplica.distributed.liveness.monitor import LivenessMonitor, find_lost_replicas
from dreplica.distributed.liveness.notes import Notes
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

FELL = Failure("ArithmeticError", "it fell")


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

    monkeypatch.setattr(liveness, "_STORE_SECONDS", 0.5)
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


def test_replica_with_the_store_waits_for_readers() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader = Notes(store)
    reader.append("answers/0", {"rank": 1, "step": 3, "compared": 3, "waiting": True, "finishing": False, "stack": []})
    reader.append("ends", {"rank": 2, "step": 3, "code": "raised", "failure": FELL.as_dict()})
    monitor = LivenessMonitor(store, 0, 3, holds_store=True)
    found: list[Any] = []
    holder = threading.Thread(target=lambda: found.append(monitor.find_lost()))
    holder.start()
    holder.join(1.5)
    assert holder.is_alive()
    assert reader.published("losses/0") is not None
    reader.count("done/0")
    holder.join(3)
    assert not holder.is_alive()
    assert found[0] == [Lost(2, "raised", 3, FELL)]
    monitor.close()


def test_report_failure_is_true_for_the_first_only() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitors = [LivenessMonitor(store, replica_id, 2) for replica_id in range(2)]
    assert [monitor.report_failure(ArithmeticError("it fell")) for monitor in monitors] == [True, False]
    for monitor in monitors:
        monitor.close()


def report_then_sleep(world: World, last_seconds: float | None) -> str:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    liveness_check._ANSWER_SECONDS = 0.2
    monitor = LivenessMonitor(store, 0, 2, last_seconds=last_seconds)
    monitor.report_failure(ArithmeticError("the alarm"))
    time.sleep(3)
    return "still there"


def test_stuck_process_is_ended_after_an_alarm() -> None:
    assert run_replicas(report_then_sleep, 1, None) == ["still there"]
    assert run_replicas(report_then_sleep, 1, 0.5) == [None]


def test_error_of_a_run_of_one_process_is_its_own_loss() -> None:
    assert find_lost_replicas(None, ArithmeticError("it fell")) == [Lost(0, "raised", failure=FELL)]
