"""Times are measured around the phases of a step without changing them."""

import json
import time

import torch
from torch import nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.state.replica import Replica
from dreplica.training.events import PHASES, PhaseTimer
from dreplica.training.step import training_step
from tests.fixtures import SMALL
from tests.harness import run_job


def test_phase_timer_adds_to_ended_phase() -> None:
    started = time.perf_counter()
    timer = PhaseTimer()
    time.sleep(0.02)
    timer.lap("loading")
    for _ in range(2):
        timer.lap("forward")
        time.sleep(0.02)
        timer.lap("checks")
    assert timer.seconds["loading"] >= 0.02
    assert timer.seconds["checks"] >= 0.04
    assert sum(timer.seconds.values()) <= time.perf_counter() - started
    assert timer.seconds["evaluation"] == 0.0


def test_step_ends_phases_in_order() -> None:
    model = nn.Linear(3, 5)
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), None)
    batch = Batch(torch.arange(4), torch.randn(4, 3), torch.arange(4))
    laps: list[str] = []
    training_step(replica, batch, TrainConfig(), laps.append)
    assert laps == ["forward", "backward", "optimizer"]
    laps.clear()
    training_step(replica, batch, TrainConfig(accumulate=2), laps.append)
    assert laps == ["forward", "backward", "forward", "backward", "optimizer"]


def test_epoch_has_timing_of_every_replica() -> None:
    job = run_job(*SMALL)
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2, job.output
    for row in rows:
        assert tuple(row["timing"]) == PHASES
        assert all(len(values) == 2 and min(values) > 0 for values in row["timing"].values())
        assert sum(values[0] for values in row["timing"].values()) < row["seconds"] + 1e-3
        assert len(row["throughput"]) == 2
        assert row["throughput"][0] == row["images_per_second"]
