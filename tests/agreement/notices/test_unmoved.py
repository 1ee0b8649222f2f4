"""Warnings about parameters with a gradient, and moving averages, that do not change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dreplica import Agreement
from tests.agreement.notices.loop import codes, make_model, sgd, train


def two_groups(model: Any, **second: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), **second}], lr=0.1)


# ---- parameters


def test_parameter_in_no_group() -> None:
    model = make_model()
    agreement = train(model, sgd(model[0]))
    (found,) = agreement.warnings
    assert (found.code, found.data["names"]) == ("parameter-not-optimized", ["2.weight", "2.bias"])
    assert found.data["steps"] == 21


def test_parameter_in_group_with_rate_of_zero() -> None:
    model = make_model()
    agreement = train(model, two_groups(model, lr=0.0))
    (found,) = agreement.warnings
    assert (found.code, found.data["names"]) == ("parameter-rate-zero", ["2.weight", "2.bias"])


def test_update_lost_in_rounding_is_reported_later() -> None:
    model = make_model().to(torch.bfloat16)
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    arguments: dict[str, Any] = {"forward": lambda inputs: model(inputs.bfloat16())}
    optimizer = torch.optim.SGD([{"params": [model[0].bias], "lr": 1e-5}, {"params": model[2].parameters()}], lr=0.1)
    model[0].weight.requires_grad_(False)
    assert codes(train(model, optimizer, steps=60, **arguments)) == []
    (found,) = train(model, optimizer, steps=120, **arguments).warnings
    assert (found.code, found.data["names"], found.data["dtype"]) == ("parameter-unmoved", ["0.bias"], "bfloat16")


class Wrapper:
    """An optimizer around another one, which has no own hooks, as accelerate's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()


def test_update_lost_in_a_wrapped_optimizer() -> None:
    model = make_model()
    (found,) = train(model, Wrapper(two_groups(model, lr=1e-30)), steps=120).warnings
    assert (found.code, found.data["names"]) == ("parameter-unmoved", ["2.weight", "2.bias"])


def test_optimizer_that_never_steps() -> None:
    model = make_model()
    optimizers = {"first": sgd(model[0]), "second": sgd(model[2])}
    optimizers["second"].step = lambda: None  # type: ignore[method-assign]
    (found,) = train(model, optimizers, steps=120).warnings
    assert (found.code, found.data["names"]) == ("parameter-unmoved", ["2.weight", "2.bias"])


class Unused(nn.Module):
    """A model with parameters of every kind that may stay."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.dead = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.frozen(x)) + 0 * self.dead(x).sum()


def test_parameters_that_may_stay_give_no_warning() -> None:
    """Frozen, without gradient, and with a gradient of 0; the first two also outside of the optimizer."""
    model = Unused()
    assert codes(train(model, steps=130)) == []
    assert codes(train(model, sgd(model.body), steps=130)) == []


def test_parameter_that_moves_late_gives_no_warning() -> None:
    """A layer that is trained from step 15 on, and a run in which every rate is 0 at first."""
    model = make_model()
    optimizer = two_groups(model, lr=0.0)

    def late(step: int) -> None:
        optimizer.param_groups[1]["lr"] = 0.1 * (step >= 15)

    assert codes(train(model, optimizer, after_step=late, steps=120)) == []
    warmed = make_model()
    all_late = sgd(warmed, lr=0.0)

    def begin(step: int) -> None:
        all_late.param_groups[0]["lr"] = 0.1 * (step >= 50)

    assert codes(train(warmed, all_late, after_step=begin, steps=120)) == []


def test_gradient_that_begins_when_it_is_read_gives_no_warning() -> None:
    """The layer has no gradient for 20 steps: it moves with the first one."""
    model = make_model()
    model[2].requires_grad_(False)
    optimizer = sgd(model)

    def unfreeze(step: int) -> None:
        model[2].requires_grad_(step >= 20)

    assert codes(train(model, optimizer, after_step=unfreeze)) == []


def test_skipped_steps_of_loss_scaler_give_no_warning() -> None:
    """With gradients that are not finite, nothing may move."""
    model = make_model()
    optimizer = sgd(model)

    def overflow(step: int) -> None:
        for parameter in model.parameters():
            parameter.grad.fill_(torch.inf)

    optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    assert codes(train(model, optimizer, before_step=overflow, steps=130)) == []


def test_gradient_of_another_loss_gives_no_warning() -> None:
    """The critic's own gradient of its bias is 0, and the generator's loss adds to it after the critic's step."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(8, 8), nn.Linear(8, 1)
    optimizers = {"generator": sgd(generator), "critic": sgd(critic)}
    agreement = Agreement({"generator": generator, "critic": critic}, optimizers)
    for _ in range(120):
        fake, real = generator(torch.randn(4, 8)), torch.randn(4, 8)
        optimizers["critic"].zero_grad()
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        optimizers["critic"].step()
        optimizers["generator"].zero_grad()
        (-critic(fake).mean()).backward()
        optimizers["generator"].step()
        agreement.step()
    agreement.finish()
    assert critic.bias.grad
    assert codes(agreement) == []


def test_negligible_gradient_gives_no_warning() -> None:
    """The gradient of a bias before a norm is rounding."""
    model = make_model()

    def rounding(step: int) -> None:
        model[0].bias.grad.fill_(1e-20)

    optimizer = sgd(model)
    assert codes(train(model, optimizer, before_step=rounding, steps=120)) == []
    assert not optimizer._optimizer_step_pre_hooks


# ---- moving averages


def swa(model: nn.Module) -> AveragedModel:
    return AveragedModel(model)


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


class ShadowEma:
    """A moving average outside of torch, with a count that moves."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = [parameter.detach().clone() for parameter in model.parameters()]
        self.num_updates = 0

    def update_parameters(self, model: nn.Module) -> None:
        for mine, new in zip(self.shadow, model.parameters(), strict=True):
            mine.lerp_(new.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        self.num_updates += 1
        return {"shadow_params": self.shadow, "num_updates": self.num_updates}


def by_name(average: Any, model: Any) -> dict[str, Any]:
    return {"compared": {"net": model, "average": average}}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def ema_by_name(average: Any, model: Any) -> dict[str, Any]:
    return {"compared": {"net": model, "ema": average}}


def in_others(average: Any, model: Any) -> dict[str, Any]:
    return {"others": [average]}


PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], dict[str, Any]], str]] = {
    "AveragedModel by name": (ema, by_name, "average"),
    "AveragedModel in others": (ema, in_others, "AveragedModel"),
    "copy by name": (copied, ema_by_name, "ema"),
    "own class in others": (ShadowEma, in_others, "ShadowEma"),
}


@pytest.mark.parametrize("place", PLACES)
def test_average_that_never_moves(place: str) -> None:
    make, pass_on, name = PLACES[place]
    model = make_model()
    average = make(model)
    (found,) = train(model, steps=110, **pass_on(average, model)).warnings
    assert (found.code, found.data["name"], found.data["steps"]) == ("average-unmoved", name, 100)


def test_average_of_stale_model_never_moves() -> None:
    """Its count moves, and its values do not."""
    model = make_model()
    average, stale = ema(model), copy.deepcopy(model)
    arguments = by_name(average, model)
    agreement = train(model, steps=110, after_step=lambda step: average.update_parameters(stale), **arguments)
    assert codes(agreement) == ["average-unmoved"]


@pytest.mark.parametrize("place", ["AveragedModel by name", "AveragedModel in others", "own class in others"])
def test_average_that_moves_gives_no_warning(place: str) -> None:
    make, pass_on, _ = PLACES[place]
    model = make_model()
    average = make(model)
    arguments = pass_on(average, model)
    assert codes(train(model, steps=110, after_step=lambda step: average.update_parameters(model), **arguments)) == []


def test_average_of_last_epochs_is_judged_at_the_end() -> None:
    model = make_model()
    average = swa(model)

    def late(step: int) -> None:
        if step > 150:
            average.update_parameters(model)

    assert codes(train(model, steps=160, after_step=late, **by_name(average, model))) == []
    never = swa(model)
    (found,) = train(model, steps=160, **by_name(never, model)).warnings
    assert (found.code, found.data["steps"]) == ("average-unmoved", 160)


def test_average_of_weights_that_stay_gives_no_warning() -> None:
    model = make_model().requires_grad_(False)
    model[2].requires_grad_(True)
    optimizer = sgd(model, lr=1e-20)
    average = ema(model)
    agreement = train(model, optimizer, steps=110, **by_name(average, model))
    assert "average-unmoved" not in codes(agreement)


@pytest.mark.parametrize("name", ["teacher", "schema", "cinema", "temanet"])
def test_frozen_copy_of_another_name_gives_no_warning(name: str) -> None:
    model = make_model()
    assert codes(train(model, steps=110, compared={"net": model, name: copied(model)})) == []


def test_trained_module_named_ema_is_a_parameter() -> None:
    """An attention with a learned moving average, whose updates are lost in rounding."""

    class MultiHeadEMA(nn.Sequential):
        pass

    model = nn.Sequential(nn.Linear(8, 8), MultiHeadEMA(nn.Linear(8, 3)))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 1e-30}]
    assert codes(train(model, torch.optim.SGD(groups, lr=0.1), steps=110)) == ["parameter-unmoved"]
