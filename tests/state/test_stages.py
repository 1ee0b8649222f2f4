"""Every part of training state has exactly one entry."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.state.fingerprint.fingerprint import digest_tensor
from dreplica.state.fingerprint.stage import ABSENT
from dreplica.state.stages import (
    Stage,
    batch_stage,
    buffers_stage,
    gradients_stage,
    optimizer_stage,
    rng_stage,
    tensors_stage,
    weights_stage,
)
from tests.agreement.bodies import flip_bit


def changed(before: Stage, after: Stage) -> list[str]:
    """Return the entries that differ, and check that the stage's digest differs if one does."""
    one, two = before.entries(), after.entries()
    names = [name for name in one | two if one.get(name) != two.get(name)]
    assert bool(names) == (before.digest != after.digest)
    return names


# Stage


def test_stage_depends_on_names_digests_and_order() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    maps: list[dict[str, Tensor]] = [
        {},
        {"a": one},
        {"b": one},
        {"a": two},
        {"a": one, "b": two},
        {"a": two, "b": one},
        {"b": two, "a": one},
    ]
    assert len({tensors_stage(tensors).digest for tensors in maps}) == len(maps)
    assert Stage(("a",), ABSENT).digest != Stage(("b",), ABSENT).digest
    assert tensors_stage(maps[4]).entries() == {name: digest_tensor(name, maps[4][name]) for name in "ab"}


def test_bytes_are_counted() -> None:
    assert tensors_stage({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.int64)}).num_bytes == 28
    assert tensors_stage({}).num_bytes == 0


# Model


class Odd(nn.Module):
    """A model with a tied parameter, a non-persistent buffer, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def test_weights_are_all_parameters_tied_ones_once() -> None:
    model = Odd()
    stage = weights_stage(model)
    assert stage.names == ("unused", "first.weight", "first.bias", "second.bias")
    assert stage.num_bytes == 4 * (1 + 4 + 2 + 2)
    for name, parameter in model.named_parameters():
        before = weights_stage(model)
        flip_bit(parameter)
        assert changed(before, weights_stage(model)) == [name]


def test_buffers_include_those_that_are_not_saved() -> None:
    model = nn.Sequential(Odd(), nn.BatchNorm1d(2))
    assert buffers_stage(model).names == ("0.hidden", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    for name, buffer in model.named_buffers():
        before = buffers_stage(model)
        flip_bit(buffer)
        assert changed(before, buffers_stage(model)) == [name]


def test_gradients_are_in_order_of_the_backward_pass() -> None:
    model = Odd()
    assert set(gradients_stage(model).entries().values()) == {ABSENT}
    model(torch.ones(1, 2)).sum().backward()
    stage = gradients_stage(model)
    assert stage.names == ("second.bias", "first.bias", "first.weight", "unused")
    assert stage.entries()["unused"] == ABSENT
    model.unused.grad = torch.zeros(1)
    assert changed(stage, gradients_stage(model)) == ["unused"]


# Batch


class Custom:
    """A container that is not supported."""


T = torch.zeros(1)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (T, ("inputs",)),
        ((T, T), ("inputs", "labels")),
        ([T, T], ("inputs", "labels")),
        ((T, T, T), ("0", "1", "2")),
        ((T,), ("0",)),
        ((T, None), ("inputs", "labels")),
        ({"x": T, "y": T}, ("x", "y")),
        ({"x": (T, T), "y": {"z": T}}, ("x.0", "x.1", "y.z")),
        (((T, T), {"boxes": [T]}), ("inputs.0", "inputs.1", "labels.boxes.0")),
        ({"x": T, "id": "a", "n": 3, "array": numpy.zeros(2)}, ("x", "id", "n", "array")),
        ({}, ()),
    ],
)
def test_names_in_a_batch(batch: Any, names: tuple[str, ...]) -> None:
    assert batch_stage(batch).names == names


def test_batch_entries_with_equal_names_are_numbered() -> None:
    def batch(one: float, two: float) -> dict[Any, Any]:
        return {"a": {"b": torch.tensor(one)}, "a.b": torch.tensor(two), 0: torch.zeros(1), "0": torch.zeros(1)}

    assert len(set(batch_stage(batch(0, 0)).names)) == 4
    assert len({batch_stage(batch(one, two)).digest for one in (0, 1) for two in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("one", "two"),
    [("a", "b"), (1, 2), (1.0, -1.0), (None, T), (numpy.zeros(2), numpy.zeros(3)), (b"a", "a"), (True, 1)],
)
def test_plain_values_in_a_batch_are_hashed(one: Any, two: Any) -> None:
    assert changed(batch_stage({"x": T, "y": one}), batch_stage({"x": T, "y": two})) == ["y"]


def test_unhashable_value_in_a_batch_is_named() -> None:
    with pytest.raises(TypeError, match=r"Custom at 'labels\.meta'"):
        batch_stage((T, {"meta": Custom()}))


# Random number generators


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (random.random, "python"),
        (lambda: numpy.random.rand(), "numpy"),
        (lambda: torch.rand(1), "torch.cpu"),
        (lambda: random.gauss(0, 1), "python"),
        (lambda: numpy.random.randn(), "numpy"),
    ],
)
def test_draw_changes_only_its_generator(draw: Callable[[], object], name: str) -> None:
    before = rng_stage()
    assert before.names[:3] == ("python", "numpy", "torch.cpu")
    assert changed(before, rng_stage()) == []
    draw()
    assert changed(before, rng_stage()) == [name]


def test_cached_normal_draw_is_hashed() -> None:
    """Both generators cache the second number of a pair: equal internal words, different state."""
    random.seed(0)
    numpy.random.seed(0)
    random.gauss(0, 1)
    numpy.random.randn()
    before = rng_stage()
    random.gauss(0, 1)
    numpy.random.randn()
    assert changed(before, rng_stage()) == ["python", "numpy"]


# Optimizer


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_names_of_settings_and_state() -> None:
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    before = optimizer_stage(model, optimizer)
    assert {"group0.lr", "group1.lr", "group0.momentum"} <= set(before.names)
    assert changed(before, optimizer_stage(model, stepped(optimizer))) == [
        "weight.momentum_buffer",
        "bias.momentum_buffer",
    ]
    for key in ("lr", "momentum", "weight_decay", "nesterov"):
        before = optimizer_stage(model, optimizer)
        optimizer.param_groups[1][key] = 0.25
        assert changed(before, optimizer_stage(model, optimizer)) == [f"group1.{key}"]


def test_flipped_bit_in_any_adam_state_is_found() -> None:
    model = nn.Linear(2, 2)
    optimizer = stepped(torch.optim.AdamW(model.parameters(), amsgrad=True))
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            before = optimizer_stage(model, optimizer)
            flip_bit(optimizer.state[parameter][key])
            assert changed(before, optimizer_stage(model, optimizer)) == [f"{name}.{key}"]


def test_parameters_outside_the_model_are_hashed() -> None:
    model, others = nn.Linear(2, 2), [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [*model.parameters(), *others]}], lr=0.1, momentum=0.9)
    stepped(optimizer)
    names = [f"group0.params.{position}" for position in (2, 3)]
    for name, parameter in zip(names, others, strict=True):
        for suffix, tensor in (("", parameter), (".momentum_buffer", optimizer.state[parameter]["momentum_buffer"])):
            before = optimizer_stage(model, optimizer)
            flip_bit(tensor)
            assert changed(before, optimizer_stage(model, optimizer)) == [name + suffix]


def test_state_under_other_keys_is_hashed() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["shared"] = {"count": 1}
    before = optimizer_stage(model, optimizer)
    optimizer.state["shared"]["count"] = 2
    assert changed(before, optimizer_stage(model, optimizer)) == ["state.shared.count"]


class Keeper:
    """An object with a `state_dict`."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> Mapping[str, Any]:
        return self.state


def of_others(*others: Any) -> Stage:
    model = nn.Linear(1, 1)
    return optimizer_stage(model, torch.optim.SGD(model.parameters(), lr=0.1), *others)


def test_two_others_of_one_class_are_numbered() -> None:
    stages = [of_others(Keeper(epoch=one), Keeper(epoch=two)) for one in (1, 2) for two in (1, 2)]
    assert len({stage.digest for stage in stages}) == 4
    assert stages[0].names[-2:] == ("Keeper.epoch", "Keeper.epoch#2")
    assert changed(stages[0], stages[1]) == ["Keeper.epoch#2"]
    assert changed(stages[0], stages[2]) == ["Keeper.epoch"]


def test_others_that_are_none_are_skipped() -> None:
    assert of_others(None).names == of_others().names


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 2),
        (0.1, 0.1 + 2**-56),
        ("a", "b"),
        (None, 0),
        ([1, 2], [2, 1]),
        ({"k": 1}, {"k": 2}),
        (numpy.float32(1), numpy.float32(2)),
        (numpy.zeros(2), numpy.ones(2)),
        (numpy.zeros(2, dtype=numpy.int64), numpy.zeros(2)),
        (numpy.zeros((1, 2)), numpy.zeros((2, 1))),
        (torch.float32, torch.bfloat16),
        (torch.relu, torch.tanh),
        (len, repr),
        (nn.Linear, nn.Conv2d),
    ],
)
def test_values_of_state_are_hashed(one: Any, two: Any) -> None:
    assert len(changed(of_others(Keeper(v=one)), of_others(Keeper(v=two)))) >= 1


@pytest.mark.parametrize("make", [object, lambda: lambda epoch: 1.0, lambda: numpy.array([object()]), lambda: {1, 2}])
def test_addresses_are_not_hashed(make: Callable[[], Any]) -> None:
    one, two = make(), make()
    assert one is not two
    assert changed(of_others(Keeper(v=one)), of_others(Keeper(v=two))) == []


def test_resumed_scaler_has_the_saved_entries() -> None:
    used = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    unused = of_others(used)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    used.scale(weight.sum()).backward()
    used.step(optimizer)
    assert of_others(used) == unused
    used.update()
    restored = torch.amp.GradScaler("cpu")
    restored.load_state_dict(used.state_dict())
    assert of_others(restored) == of_others(used)
    assert changed(unused, of_others(used)) == ["GradScaler.scale"]
