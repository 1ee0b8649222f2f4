"""The warning about gradients that are never set to zero: only where each backward pass adds to what was left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dreplica import Agreement
from tests.agreement.notices.loop import codes, make_model, sgd, train


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(parameter._backward_hooks or ()) + len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
        for parameter in model.parameters()
    )


@pytest.mark.parametrize("backwards", [1, 3])
def test_gradients_that_add_up_are_named(backwards: int) -> None:
    model = make_model()
    agreement = train(model, sgd(model, lr=0.01), zero=None, backwards=backwards)
    (found,) = agreement.warnings
    assert (found.code, found.data["tensor"]) == ("gradients-not-zeroed", "2.bias")
    assert found.data["step"] - found.data["before"] == 1
    assert not hooks_of(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clipped_gradients_that_add_up_are_named(momentum: float) -> None:
    model = make_model()

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    agreement = train(model, sgd(model, momentum=momentum), zero=None, before_step=clip)
    assert codes(agreement) == ["gradients-not-zeroed"]


def kept(optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)


def by_hand(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0)


def scaled_down(optimizer: Any) -> None:
    """Keep a part of each gradient on purpose."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.9)


@pytest.mark.parametrize("zero", [kept, by_hand, scaled_down, lambda optimizer: optimizer.zero_grad()])
@pytest.mark.parametrize("backwards", [1, 3])
def test_gradients_set_to_zero_give_no_warning(zero: Callable[[Any], None], backwards: int) -> None:
    model = make_model()
    assert codes(train(model, zero=zero, backwards=backwards)) == []
    assert not hooks_of(model)


def test_gradients_zeroed_in_the_optimizer_give_no_warning() -> None:
    model = make_model()
    optimizer = sgd(model)
    assert codes(train(model, optimizer, zero=None, after_step=lambda step: kept(optimizer))) == []


def test_only_one_of_two_optimizers_is_named() -> None:
    model = make_model()
    optimizers = {"body": sgd(model[0]), "head": sgd(model[2])}

    def zero(optimizer: Any) -> None:
        if optimizer is optimizers["body"]:
            optimizer.zero_grad()

    (found,) = train(model, optimizers, zero=zero).warnings
    assert (found.code, found.data["optimizer"]) == ("gradients-not-zeroed", "the head optimizer")


def test_gradient_left_by_another_loss_gives_no_warning() -> None:
    """The critic's backward pass reaches the generator, whose gradients are set to zero only after that."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(8, 8), nn.Linear(8, 1)
    optimizers = {"generator": sgd(generator), "critic": sgd(critic)}
    agreement = Agreement({"generator": generator, "critic": critic}, optimizers)
    for _ in range(30):
        kept(optimizers["critic"])
        critic(generator(torch.randn(4, 8))).mean().backward()
        optimizers["critic"].step()
        kept(optimizers["generator"])
        loss = -critic(generator(torch.randn(4, 8))).mean()
        loss.backward()
        optimizers["generator"].step()
        agreement.step(loss=loss)
    agreement.finish()
    assert codes(agreement) == []


def test_gradients_of_zero_give_no_warning() -> None:
    model = make_model()
    assert codes(train(model, zero=None, change_loss=lambda step, loss: 0 * loss)) == []


def test_hooks_are_removed_by_close() -> None:
    model = make_model()
    optimizer = sgd(model)
    agreement = Agreement(model, optimizer)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        agreement.step()
    assert hooks_of(model)
    agreement.close()
    assert not hooks_of(model)


def test_watching_changes_no_bit() -> None:
    """The hooks read gradients and do not replace them."""
    plain, watched = make_model(), make_model()
    watched.load_state_dict(plain.state_dict())
    train(watched, zero=kept)
    torch.manual_seed(0)
    optimizer = sgd(plain)
    for _ in range(30):
        inputs, labels = torch.randn(10, 8), torch.randint(3, (10,))
        kept(optimizer)
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        optimizer.step()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
