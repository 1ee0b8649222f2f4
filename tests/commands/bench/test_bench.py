"""The benchmark: three loops in alternating rounds. What it measures is never asserted, only that it does."""

import io
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from dreplica.commands.bench.loops import Bench
from dreplica.commands.bench.results import Measured, Memory, median_interval, print_measured
from dreplica.config.load import load_config
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StoppedOnRequest, StopRequest
from dreplica.environment.device import Device
from dreplica.errors import UsageError
from dreplica.run.bootstrap import Prepared
from dreplica.run.session import Session
from tests.fixtures import SMALL, merged
from tests.harness import run_replicas

OVER_AFTER_AN_EPOCH = (
    "--schedule.name=OneCycleLR",
    "--schedule.per=step",
    "--schedule.max_lr=0.1",
    "--schedule.total_steps=5",
)


def session(world: World, *settings: str) -> Session:
    config = load_config(merged(*SMALL, *settings), world.num_replicas)
    return Session(Prepared(config, config, Device(torch.device("cpu"))), world, StopRequest())


def measure(world: World, steps: int | None) -> Any:
    bench = Bench(session(world, *OVER_AFTER_AN_EPOCH), steps)
    replica = bench.session.replica
    before = replica.steps_done
    measured = bench.measure(rounds=2)
    state = 2 * sum(tensor.nbytes for tensor in replica.model.state_dict().values())
    return measured, bench.steps, replica.steps_done - before, state


def test_bench_times_loops_and_hashes_all_state() -> None:
    for measured, steps, taken, state in run_replicas(measure, 2, None):
        assert steps == 4  # of the epoch's five batches, one starts the loader
        assert {name: len(seconds) for name, seconds in measured.seconds.items()} == {"a": 2, "b": 2, "c": 2}
        assert all(second > 0 for seconds in measured.seconds.values() for second in seconds)
        assert len(measured.checks) == 2
        assert all(share > 0 for share in measured.checks)
        assert measured.bytes_per_step > state
        assert measured.snapshot_seconds > 0
        assert measured.memory is None
        assert taken == 2 * 3 * 5  # loops b and c go through the trainer's own step, one uncounted round included


def test_bench_rejects_steps_beyond_an_epoch() -> None:
    for result in run_replicas(measure, 2, 5):
        assert isinstance(result, UsageError)
        assert "--steps: 5" in str(result)
        assert "--steps 4" in str(result)


def stop_on_one(world: World) -> None:
    bench = Bench(session(world), None)
    bench.session.stop_request.signal_name = "SIGINT" if world.replica_id == 1 else None
    bench.measure(10**6)


def test_bench_stops_on_all_replicas() -> None:
    assert [type(result) for result in run_replicas(stop_on_one, 2)] == [StoppedOnRequest] * 2


def test_measured_ratios_and_output() -> None:
    seconds = {"a": [1.0, 2.0, 4.0], "b": [1.0, 2.0, 4.0], "c": [1.5, 2.2, 4.4]}
    measured = Measured(seconds, 1_500_000, 0.05, checks=[0.016, 0.012, 0.015])
    assert measured.ratios("c", "a") == [1.5, 1.1, 1.1]
    text = io.StringIO()
    print_measured(Console(file=text, width=100), measured, num_replicas=2, steps=4, snapshot_every=50)
    assert "2 replicas, 3 alternating rounds of 4 steps" in text.getvalue()
    assert "(c)/(a) = 1.100  (95 %: 1.100 to 1.500)" in text.getvalue()
    assert "checks alone: 1.50% of the rest of the step  (95 %: 1.20% to 1.60%)" in text.getvalue()
    assert "1.5 MB per step" in text.getvalue()
    assert "a snapshot every 50 steps: 50.0 ms each, not in the above; 0.05% of a step" in text.getvalue()
    assert "device memory" not in text.getvalue()
    on_gpu = replace(measured, memory=Memory(checks=1_200_000, snapshot=138_000_000))
    print_measured(Console(file=text, width=100), on_gpu, num_replicas=2, steps=4, snapshot_every=50)
    assert "device memory of the checks: 1.2 MB, and a snapshot 138.0 MB" in text.getvalue()


def test_median_interval() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)  # the best there is
    for n, k in ((6, 1), (8, 1), (9, 2), (12, 3), (24, 7), (30, 10), (100, 40)):  # tables of the sign test
        assert median_interval([float(value) for value in range(n, 0, -1)]) == (k, n + 1 - k)
