"""The loop: when the scheduler steps, when it stops, and the same trace again for any number of replicas."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.config.schema import RunConfig
from dreplica.data.datasets import load_data
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.distributed.process_group import World, open_world
from dreplica.distributed.signals import StopRequest
from dreplica.replica.build import build_replica
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.events import EpochDone, StepDone, Stopped
from dreplica.training.history import History
from dreplica.training.loop import train
from tests.harness import run_replicas
from tests.trace_rows import read_rows

CPU = torch.device("cpu")
STEPS = 5
"""Of an epoch: 80 samples in batches of 16."""


def config(**sections: Any) -> RunConfig:
    base = {
        "model": {"factory": "tests.fixtures:tiny_model"},
        "data": {"name": "tests.fixtures:tiny_images", "batch_size": 16},
        "train": {"epochs": 3},
        "schedule": {"name": "ExponentialLR", "gamma": 0.5},
        "optim": {"name": "SGD", "lr": 1.0},
        "determinism": {},
    }
    return RunConfig.model_validate({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


def run(
    world: World, run_config: RunConfig, stop_after: int | None = None
) -> tuple[list[StepDone | EpochDone | Stopped], list[dict[str, Any]], Replica, list[float]]:
    """Trains; returns the events, the trace's lines, the replica, and the learning rate at each step."""
    torch.set_num_threads(1)
    seed_generators(run_config.seed.model)  # type: ignore[arg-type]
    data = load_data(run_config.data)
    replica = build_replica(run_config, data.num_classes, CPU)
    request = StopRequest()
    events, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        with TraceWriter(path, world.num_replicas) as trace:
            agreement = Agreement(
                replica.model,
                replica.optimizer,
                others=[replica.scheduler],
                lag=1,
                trace=trace,
                channel=world.channel,
            )
            coordinator = IndexSampler(world.channel, run_config.seed.data or 0)
            history = History(replica, 0)
            for event in train(replica, data, coordinator, agreement, run_config, world, CPU, request, history):
                events.append(event)
                if isinstance(event, StepDone):
                    rates.append(replica.optimizer.param_groups[0]["lr"])
                    if event.step == stop_after:
                        request.signal_name = "SIGTERM"
        lines = read_rows(path)
    return events, lines, replica, rates


def alone(run_config: RunConfig, stop_after: int | None = None) -> Any:
    with open_world(timeout=30) as world:
        return run(world, run_config, stop_after)


def digests(lines: Sequence[dict[str, Any]]) -> list[Any]:
    return [(line["step"], line["digests"]) for line in lines[1:]]


def numbers(events: Sequence[Any]) -> list[Any]:
    return [(event.epoch, event.step, event.train, event.val) for event in events if isinstance(event, EpochDone)]


def test_scheduler_steps_after_epoch() -> None:
    _, _, replica, rates = alone(config())
    assert rates == [1.0] * STEPS + [0.5] * STEPS + [0.25] * STEPS
    assert replica.optimizer.param_groups[0]["lr"] == 0.125
    assert replica.scheduler.last_epoch == 3


def test_scheduler_steps_after_optimizer() -> None:
    _, _, replica, rates = alone(config(schedule={"per": "step"}))
    assert rates == [0.5**step for step in range(1, 3 * STEPS + 1)], "as each step leaves them"
    assert replica.scheduler.last_epoch == 3 * STEPS


@pytest.mark.parametrize(("max_steps", "epochs", "last_epoch"), [(7, 2, 1), (5, 1, 1), (3, 1, 0), (99, 3, 3)])
def test_max_steps_ends_epoch_and_evaluates(max_steps: int, epochs: int, last_epoch: int) -> None:
    events, lines, replica, _ = alone(config(train={"max_steps": max_steps}))
    steps = [event for event in events if isinstance(event, StepDone)]
    taken = min(max_steps, 3 * STEPS)
    assert [event.step for event in steps] == list(range(1, taken + 1))
    assert [event.step_in_epoch for event in steps] == [(step - 1) % STEPS + 1 for step in range(1, taken + 1)]
    assert {event.steps_in_epoch for event in steps} == {STEPS}
    assert len(numbers(events)) == epochs
    assert numbers(events)[-1][1] == taken
    assert replica.scheduler.last_epoch == last_epoch, "an epoch cut short is no epoch for the scheduler"
    assert max(line["step"] for line in lines[1:]) == taken


def test_stop_request_stops_all_after_same_step() -> None:
    events, _, replica, _ = alone(config(), stop_after=6)
    assert isinstance(events[-1], Stopped)
    # Compared one step later: the request is seen with the comparison of the step after it.
    assert 7 <= events[-1].step <= 8
    assert events[-1].epoch == 2
    assert replica.scheduler.last_epoch == 1


def test_trace_depends_on_seed_only() -> None:
    events, lines, _, _ = alone(config())
    again, lines_again, _, _ = alone(config())
    assert digests(lines_again) == digests(lines)
    assert numbers(again) == numbers(events)
    assert len(digests(lines)) == 1 + 3 * STEPS + 3, "the build, the steps, and an evaluation for each epoch"
    _, other_order, _, _ = alone(config(seed={"data": 1}))
    assert digests(other_order)[0] == digests(lines)[0], "the build does not draw from the data's stream"
    assert digests(other_order)[1][1]["indices"] != digests(lines)[1][1]["indices"]


def run_body(world: World, sections: dict[str, Any]) -> Any:
    events, lines, _, _ = run(world, config(**sections))
    return digests(lines) if world.is_coordinator else None, numbers(events)


def test_digests_do_not_depend_on_num_replicas() -> None:
    sections = {"train": {"epochs": 2}}
    with open_world(timeout=30) as world:
        expected, (one, two) = run_body(world, sections)
    for num_replicas in (2, 3, 4):
        results = run_replicas(run_body, num_replicas, sections)
        assert results[0][0] == expected
        for _, epochs in results:
            for (epoch, step, train_numbers, val_numbers), alone_numbers in zip(epochs, (one, two), strict=True):
                assert (epoch, step) == alone_numbers[:2]
                for own, single in ((train_numbers, alone_numbers[2]), (val_numbers, alone_numbers[3])):
                    assert own == {key: value * num_replicas for key, value in single.items()}


def pooled(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes)
    )
