"""Warnings of `Agreement` about optimizers, schedulers and memory, only where they are certain."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dreplica.agreement.notices.bindings import warn_of_bindings
from dreplica.agreement.subject import Subject
from tests.agreement.notices.loop import codes, make_model, sgd, train

schedulers = torch.optim.lr_scheduler


def found(model: Any, optimizer: Any, *others: Any) -> list[str]:
    return [each.code for each in warn_of_bindings(Subject(model, optimizer, others))]


def test_optimizer_of_another_model() -> None:
    for foreign in (make_model(), nn.Linear(9, 9)):
        agreement = train(make_model(), sgd(foreign), steps=25)
        assert codes(agreement) == ["optimizer-not-bound"]  # and not that each parameter does not move
        assert "To fix it: optimizer = torch.optim.SGD(model.parameters(), ...)" in agreement.warnings[0].text


def test_copied_optimizer_and_replaced_head() -> None:
    model = make_model()
    assert found(model, copy.deepcopy(sgd(model))) == ["optimizer-not-bound"]
    optimizer = sgd(model)
    model[2] = nn.Linear(16, 3)
    assert found(model, optimizer) == ["optimizer-not-bound"]


def test_scheduler_of_another_optimizer() -> None:
    model = make_model()
    optimizer = sgd(model)
    assert found(model, optimizer, schedulers.StepLR(sgd(model), 1)) == ["scheduler-not-bound"]
    assert found(model, optimizer, copy.deepcopy(schedulers.StepLR(optimizer, 1))) == ["scheduler-not-bound"]
    assert found(model, optimizer, schedulers.StepLR(optimizer, 1), torch.amp.GradScaler("cpu"), None) == []


def test_shared_memory_of_trained_parameter() -> None:
    model = make_model()
    model.append(nn.Linear(3, 3))
    model[3].bias = nn.Parameter(model[2].bias.detach())
    assert found(model, sgd(model)) == ["storage-shared"]
    assert found(model, None) == ["storage-shared"]


def with_loss(model: Any) -> tuple[Any, Any]:
    """An optimizer that also trains the parameters of a loss."""
    return model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)


def separate_loss(model: Any) -> tuple[Any, Any]:
    return model, {"net": sgd(model), "loss": torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)}


def head_only(model: Any) -> tuple[Any, Any]:
    return model, sgd(model[2])


def frozen_body(model: Any) -> tuple[Any, Any]:
    model[0].requires_grad_(False)
    return model, sgd(model[2])


def several(model: Any) -> tuple[Any, Any]:
    other = make_model()
    return {"one": model, "two": other}, {"one": sgd(model), "two": sgd(other)}


def one_for_two(model: Any) -> tuple[Any, Any]:
    other = make_model()
    return {"one": model, "two": other}, torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)


def compiled(model: Any) -> tuple[Any, Any]:
    return torch.compile(model), sgd(model)


def views_as_buffers(model: Any) -> tuple[Any, Any]:
    table = torch.arange(6.0)
    model.register_buffer("table", table)
    model.register_buffer("first", table[:3])
    return model, sgd(model)


def no_optimizer(model: Any) -> tuple[Any, Any]:
    return model, None


@pytest.mark.parametrize(
    "make",
    [with_loss, separate_loss, head_only, frozen_body, several, one_for_two, compiled, views_as_buffers, no_optimizer],
)
def test_bindings_with_a_reason_give_no_warning(make: Callable[[Any], tuple[Any, Any]]) -> None:
    model, optimizer = make(make_model())
    assert found(model, optimizer) == []
