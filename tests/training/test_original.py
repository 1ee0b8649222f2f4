"""Counters of a step, and what is kept of it until it agrees."""

import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.config.load import load_config
from dreplica.data.datasets import load_data
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import Batch
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.replica.build import build_replica
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.events import StepDone
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.original import Footprint, StepMeter
from dreplica.training.step import StepOutput
from tests.fixtures import SMALL, merged

BATCH = Batch(torch.arange(4), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.fixture
def replica() -> Replica:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def metered(replica: Replica, writes_to: Tensor | None = None, nodes: int = 0) -> Footprint:
    """Take a step by hand, with more writes and autograd nodes, and return what was counted."""
    meter = StepMeter(replica)
    meter.start(BATCH)
    replica.optimizer.zero_grad()
    logits = replica.model(BATCH.inputs)
    for _ in range(nodes):
        logits = logits * 1.0
    loss = replica.criterion(logits, BATCH.labels)
    loss.backward()
    replica.optimizer.step()
    if writes_to is not None:
        with torch.no_grad():
            writes_to.mul_(1.0)
    return meter.stop(BATCH, StepOutput(loss.detach(), logits.detach()))


def counted(footprint: Footprint) -> dict[str, int]:
    return {**dict(zip(footprint.tensors, footprint.writes, strict=True)), **footprint.passing}


def test_writes_are_counted_by_tensor(replica: Replica) -> None:
    metered(replica)  # the optimizer makes its state
    before = counted(metered(replica))
    for name, tensor in (
        ("model.0.weight", replica.model[0].weight),
        ("model.1.running_var", replica.model[1].running_var),
        ("optimizer.0.bias.momentum_buffer", replica.optimizer.state[replica.model[0].bias]["momentum_buffer"]),
        ("batch.inputs", BATCH.inputs),
    ):
        after = counted(metered(replica, writes_to=tensor))
        assert {key: after[key] - before[key] for key in before if after[key] != before[key]} == {name: 1}


def test_gradients_are_counted_whether_kept_or_not(replica: Replica) -> None:
    metered(replica)
    weight = replica.model[0].weight
    fresh = counted(metered(replica))["gradients.model.0.weight"]
    assert counted(metered(replica))["gradients.model.0.weight"] == fresh
    meter = StepMeter(replica)
    meter.start(BATCH)
    assert weight.grad is not None
    weight.grad.mul_(2.0)
    output = StepOutput(torch.zeros(()), torch.zeros(4, 4))
    assert meter.stop(BATCH, output).passing["gradients.model.0.weight"] == 1


def test_nodes_are_counted(replica: Replica) -> None:
    assert metered(replica, nodes=3).nodes == metered(replica).nodes + 3


def test_flipped_memory_moves_no_counter(replica: Replica) -> None:
    metered(replica)
    before = counted(metered(replica))
    replica.model[0].weight.data.view(torch.int32)[0, 0] ^= 1
    assert counted(metered(replica)) == before


def test_loop_keeps_only_steps_that_may_diverge() -> None:
    config = load_config(merged(*SMALL, "--data.batch_size=8", "--train.epochs=1"), 1)
    data = load_data(config.data)
    seed_generators(42)
    replica = build_replica(config, data.num_classes, torch.device("cpu"))
    world = World(0, 1, Channel(), None, "here")
    agreement = Agreement(replica.model, replica.optimizer, lag=1, quiet=True, all_generators=True)
    history = History(replica, config.agreement.snapshot_every)
    coordinator = IndexSampler(world.channel, 0)
    events = train(replica, data, coordinator, agreement, config, world, torch.device("cpu"), StopRequest(), history)
    steps = []
    for event in events:
        if isinstance(event, StepDone):
            steps.append(event.step)
            assert [*history.originals] == [event.step]
            original = history.originals[event.step]
            assert original.batch is not None
            assert original.output.logits.shape == (8, 5)
            assert set(original.generators) >= {"python", "numpy", "torch.cpu"}
    assert steps == list(range(1, 11))
