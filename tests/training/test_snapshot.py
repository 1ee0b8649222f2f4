"""A snapshot restored is the state it was taken from, byte for byte."""

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dreplica.agreement.stages import (
    Stage,
    buffers_stage,
    gradients_stage,
    optimizer_stage,
    rng_stage,
    weights_stage,
)
from dreplica.data.loader import Batch
from dreplica.replica.replica import Replica
from dreplica.training.snapshot import restore_snapshot, take_snapshot
from dreplica.training.step import TrainConfig, training_step
from tests.fixtures import tiny_model

OPTIMIZERS: list[Any] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01), foreach=False),
]


def make_replica(make_optimizer: Any, dtype: torch.dtype = torch.float32) -> Replica:
    torch.manual_seed(0)
    model = tiny_model(5).to(dtype)
    optimizer = make_optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler)


def make_batch(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 3, 8, 8, generator=generator).to(dtype)
    return Batch(torch.arange(6), inputs, torch.randint(5, (6,), generator=generator))


def state_of(replica: Replica) -> dict[str, Stage]:
    model = replica.model
    return {
        "weights": weights_stage(model),
        "buffers": buffers_stage(model),
        "gradients": gradients_stage(model),
        "optimizer": optimizer_stage(model, replica.optimizer, replica.scheduler),
        "rng": rng_stage(),
    }


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_restored_state_is_byte_identical(make_optimizer: Any, steps_before: int) -> None:
    replica = make_replica(make_optimizer)
    for seed in range(steps_before):
        training_step(replica, make_batch(seed), TrainConfig())
    replica.model[4].eval()
    before, modes = state_of(replica), {name: module.training for name, module in replica.model.named_modules()}
    memory = {name: parameter.data_ptr() for name, parameter in replica.model.named_parameters()}
    snapshot = take_snapshot(replica)
    replica.model.train()
    for seed in range(5, 8):
        training_step(replica, make_batch(seed), TrainConfig())
    replica.scheduler.step()
    random.random()
    numpy.random.rand()
    assert all(state_of(replica)[name] != before[name] for name in ("weights", "buffers", "optimizer", "rng"))

    restore_snapshot(replica, snapshot)

    assert state_of(replica) == before
    assert {name: module.training for name, module in replica.model.named_modules()} == modes
    assert {name: parameter.data_ptr() for name, parameter in replica.model.named_parameters()} == memory
    assert replica.steps_done == steps_before


def test_a_snapshot_can_be_restored_more_than_once() -> None:
    replica = make_replica(OPTIMIZERS[1])
    training_step(replica, make_batch(0), TrainConfig())
    snapshot = take_snapshot(replica)
    results = []
    for _ in range(2):
        restore_snapshot(replica, snapshot)
        training_step(replica, make_batch(1), TrainConfig())
        results.append(state_of(replica))
    assert results[0] == results[1]


def test_state_of_another_dtype_than_its_parameter_is_kept() -> None:
    """load_state_dict would cast it."""
    replica = make_replica(OPTIMIZERS[0], torch.bfloat16)
    training_step(replica, make_batch(0, torch.bfloat16), TrainConfig())
    for state in replica.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float() * 1.0001
    before = state_of(replica)
    snapshot = take_snapshot(replica)
    replica.optimizer.state.clear()
    restore_snapshot(replica, snapshot)
    assert state_of(replica) == before


def test_taking_a_snapshot_changes_nothing() -> None:
    replica = make_replica(OPTIMIZERS[0])
    training_step(replica, make_batch(0), TrainConfig())
    before = copy.deepcopy(state_of(replica))
    take_snapshot(replica)
    assert state_of(replica) == before


class Growing(nn.Module):
    """Buffers that come, go and change their size in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("later", None)
        self.register_buffer("sized", torch.zeros(1), persistent=False)
        self.register_buffer("gone", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("added", torch.ones(2))
        self.later = torch.ones(2)
        self.sized = torch.zeros(len(x) + 1)
        self.gone = None
        return self.linear(x)


def test_buffers_that_a_forward_pass_has_added_removed_or_resized_are_as_before() -> None:
    model = Growing()
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), None)
    sized = model.sized
    before, names = buffers_stage(model), dict(model._buffers).keys()
    snapshot = take_snapshot(replica)
    model(torch.ones(3, 2))
    assert buffers_stage(model) != before
    restore_snapshot(replica, snapshot)
    assert buffers_stage(model) == before
    assert dict(model._buffers).keys() == names
    assert model.later is None
    assert list(model.state_dict()) == ["gone", "linear.weight", "linear.bias"]
    assert sized is not model.sized
    model.linear(torch.ones(3, 2))
    restore_snapshot(replica, snapshot)
    assert buffers_stage(model) == before
