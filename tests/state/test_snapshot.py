"""A restored snapshot equals the state it was taken from, byte for byte."""

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.state.replica import Replica
from dreplica.state.snapshot import restore_snapshot, take_snapshot
from dreplica.state.stages import (
    Stage,
    buffers_stage,
    gradients_stage,
    optimizer_stage,
    rng_stage,
    weights_stage,
)
from dreplica.training.step import training_step
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


def test_snapshot_can_be_restored_twice() -> None:
    replica = make_replica(OPTIMIZERS[1])
    training_step(replica, make_batch(0), TrainConfig())
    snapshot = take_snapshot(replica)
    results = []
    for _ in range(2):
        restore_snapshot(replica, snapshot)
        training_step(replica, make_batch(1), TrainConfig())
        results.append(state_of(replica))
    assert results[0] == results[1]


def test_snapshot_keeps_dtype_of_optimizer_state() -> None:
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
    """Buffers that the forward pass adds, removes and resizes."""

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


def test_snapshot_restores_changed_buffers() -> None:
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
    assert sized is model.sized
    model.linear(torch.ones(3, 2))
    restore_snapshot(replica, snapshot)
    assert buffers_stage(model) == before


class Stateful(nn.Module):
    """State in attributes that no state_dict contains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(1).expand(2))
        self.register_buffer("kept", torch.zeros(2, 2))
        self.calls, self.seen = 0, [torch.zeros(2)]
        self.random = random.Random(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.seen[-1] + x.detach().mean(0))
        self.kept = self.linear.weight.data
        return self.linear(x) * self.mask * (1 + 0.1 * self.calls) + self.seen[-1] + self.random.random()


class Counting(torch.optim.SGD):
    """Optimizer whose learning rate decreases by a count that is a class attribute at first."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
            group["last"] = self.count
        return super().step(closure)


class Loss(nn.Module):
    """Criterion with a parameter and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.calls = 0

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(outputs * self.scale * self.calls, labels)


def stateful_replica() -> Replica:
    torch.manual_seed(0)
    model, criterion = Stateful(), Loss()
    parameters = [*model.parameters(), *criterion.parameters()]
    return Replica(model, criterion, Counting(parameters, lr=0.1, momentum=0.9))


def step_by_hand(replica: Replica) -> None:
    training_step(replica, Batch(torch.arange(3), torch.rand(3, 2), torch.tensor([0, 1, 1])), TrainConfig())


def attribute_state(replica: Replica) -> list[Any]:
    model, criterion, optimizer = replica.model, replica.criterion, replica.optimizer
    gradients = [criterion.scale.grad, model.linear.weight.grad]
    tensors = [*model.seen, model.mask, model.kept, criterion.scale, model.linear.weight]
    return [
        [tensor.detach().clone().numpy().tobytes() for tensor in tensors],
        [None if gradient is None else gradient.tolist() for gradient in gradients],
        (model.calls, criterion.calls, optimizer.count, "count" in vars(optimizer)),
        model.random.getstate(),
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        [module.training for root in (model, criterion) for module in root.modules()],
        [tensor.data_ptr() for tensor in (model.mask, model.kept, criterion.scale)],
    ]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_snapshot_restores_attributes(steps_before: int) -> None:
    replica = stateful_replica()
    for _ in range(steps_before):
        step_by_hand(replica)
    before, held = (
        attribute_state(replica),
        (replica.model.seen, replica.optimizer.state, replica.optimizer.param_groups),
    )
    snapshot = take_snapshot(replica)
    ends = []
    for _ in range(2):
        replica.criterion.eval()
        for _ in range(2):
            step_by_hand(replica)
        replica.model.extra = nn.Linear(2, 2)
        replica.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
        ends.append([*attribute_state(replica), *optimizer_stage(replica.model, replica.optimizer).entries().items()])
        replica.optimizer.state = {}
        restore_snapshot(replica, snapshot)
        assert attribute_state(replica) == before
        assert held[0] is replica.model.seen
        assert held[1] is replica.optimizer.state
        assert held[2] is replica.optimizer.param_groups
    assert ends[0] == ends[1]


def test_snapshot_finds_tensors_by_stage_and_name() -> None:
    replica = stateful_replica()
    step_by_hand(replica)
    snapshot = take_snapshot(replica)
    named = {
        ("weights", "linear.weight"): replica.model.linear.weight,
        ("buffers", "mask"): replica.model.mask,
        ("gradients", "linear.bias"): replica.model.linear.bias.grad,
        ("optimizer", "linear.bias.momentum_buffer"): replica.optimizer.state[replica.model.linear.bias][
            "momentum_buffer"
        ],
        ("optimizer", "group0.params.2.momentum_buffer"): replica.optimizer.state[replica.criterion.scale][
            "momentum_buffer"
        ],
    }
    entries = optimizer_stage(replica.model, replica.optimizer).entries()
    for (stage, name), tensor in named.items():
        found = snapshot.find(stage, name)
        assert found is not None
        assert found is not tensor
        assert found.tolist() == tensor.tolist()
        assert stage != "optimizer" or name in entries
    assert snapshot.find("weights", "nothing") is None


def test_snapshot_restores_wrapped_optimizer() -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.SGD(model.parameters(), lr=0.0)
    outer.inner = inner
    outer.register_step_post_hook(lambda *_: inner.step())
    replica = Replica(model, nn.CrossEntropyLoss(), outer)
    step_by_hand(replica)
    before = optimizer_stage(model, inner)
    snapshot = take_snapshot(replica)
    step_by_hand(replica)
    assert optimizer_stage(model, inner) != before
    restore_snapshot(replica, snapshot)
    assert optimizer_stage(model, inner) == before


def test_snapshot_restores_hooks() -> None:
    replica = make_replica(OPTIMIZERS[0])
    calls = []

    def once(*_: Any) -> None:
        calls.append(1)
        handle.remove()

    handle = replica.model.register_forward_hook(once)
    snapshot = take_snapshot(replica)
    for expected in (1, 2):
        for seed in range(2):
            training_step(replica, make_batch(seed), TrainConfig())
        assert len(calls) == expected
        restore_snapshot(replica, snapshot)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_snapshot_restores_scaler_without_sync(steps_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading its tensors synchronizes with the GPU, as its `state_dict` does."""
    replica = make_replica(OPTIMIZERS[0])
    scaler = replica.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
    for seed in range(steps_before):
        training_step(replica, make_batch(seed), TrainConfig())
    before, tensors = scaler.state_dict(), (scaler._scale, scaler._growth_tracker)
    with monkeypatch.context() as patched:
        patched.delattr(torch.amp.GradScaler, "state_dict")
        patched.delattr(torch.amp.GradScaler, "get_scale")
        snapshot = take_snapshot(replica)
    for _ in range(2):
        training_step(replica, make_batch(5), TrainConfig())
        after = scaler.state_dict()
        assert after != before
        restore_snapshot(replica, snapshot)
        assert scaler.state_dict() == before
        assert all(now is then for now, then in zip((scaler._scale, scaler._growth_tracker), tensors, strict=True))
        training_step(replica, make_batch(5), TrainConfig())
        assert scaler.state_dict() == after
        restore_snapshot(replica, snapshot)
