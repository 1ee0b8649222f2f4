"""The liveness monitor, and its report of lost replicas."""

import os
import pickle
import signal
import threading
import time

import pytest
import torch.distributed as dist

from dreplica.distributed import liveness
from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness import (
    LivenessMonitor,
    Lost,
    ReplicaLost,
    exit_code_of,
    find_lost_replicas,
    is_reporter,
)
from dreplica.distributed.process_group import World
from dreplica.errors import DreplicaError, ExitCode
from tests.harness import run_replicas


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


def report_then_sleep(world: World, last_seconds: float | None) -> str:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monitor = LivenessMonitor(store, 0, 2, last_seconds=last_seconds)
    monitor.report_failure(ArithmeticError("the alarm"))
    time.sleep(3)
    return "still there"


def test_stuck_process_is_ended_after_an_alarm() -> None:
    assert run_replicas(report_then_sleep, 1, None) == ["still there"]
    assert run_replicas(report_then_sleep, 1, 0.5) == [None]


FELL = Failure("ArithmeticError", "it fell")


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (Lost(1), "no response: the process was killed or its host is down"),
        (Lost(1, "raised", failure=FELL), "raised ArithmeticError: it fell"),
        (Lost(1, "unusable", failure=Failure("UsageError", "optim.lr: bad")), "optim.lr: bad"),
        (Lost(1, "hung", 6), "hangs after step 6: its process responds, but the other replicas wait for it"),
        (Lost(1, "hung"), "hangs before the first step: its process responds, but the other replicas wait for it"),
        (Lost(0, "store-no-response"), "no response from the rendezvous store, which this replica serves"),
        (Lost(0, "store-lost", detail="reset"), "the rendezvous store, which this replica served, is gone (reset)"),
    ],
)
def test_reason_is_rendered_from_data(lost: Lost, reason: str) -> None:
    assert lost.reason == reason
    assert lost.as_dict()["reason"] == reason
    assert lost.as_dict()["code"] == lost.code


def test_replica_lost_has_a_code_and_fields() -> None:
    error = ReplicaLost("gone", code="timeout", lost=[Lost(2), Lost(3, "raised", failure=FELL)], seconds=1.0)
    assert isinstance(error, DreplicaError)
    assert isinstance(error, RuntimeError)
    assert (error.code, error.fields["seconds"], error.fields["ranks"]) == ("timeout", 1.0, [2, 3])
    assert error.fields["reasons"] == {2: "no-response", 3: "raised"}
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.fields, copy.lost) == ("gone", error.code, error.fields, error.lost)


def test_error_of_a_run_of_one_process_is_its_own_loss() -> None:
    assert find_lost_replicas(None, ArithmeticError("it fell")) == [Lost(0, "raised", failure=FELL)]


@pytest.mark.parametrize(("gone", "reporter"), [([], 0), ([0], 1), ([0, 1], 2), ([0, 1, 2], 0)])
def test_first_survivor_is_the_reporter(gone: list[int], reporter: int) -> None:
    lost = [Lost(replica_id) for replica_id in gone]
    assert [is_reporter(lost, replica_id, 3) for replica_id in range(3)] == [i == reporter for i in range(3)]


def test_exit_code_is_unusable_if_all_losses_are() -> None:
    unusable = Lost(1, "unusable", failure=FELL)
    assert exit_code_of([unusable]) == ExitCode.UNUSABLE
    assert exit_code_of([unusable, Lost(2)]) == exit_code_of([]) == ExitCode.FAILED
