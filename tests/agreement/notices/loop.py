"""A small training loop of one process, with a place for a mistake."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreplica import Agreement


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def train(
    model: nn.Module | None = None,
    optimizer: Any = None,
    *,
    steps: int = 30,
    change_loss: Callable[[int, Tensor], Tensor] = lambda step, loss: loss,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
    zero: Callable[[Any], None] | None = lambda optimizer: optimizer.zero_grad(),
    forward: Callable[[Tensor], Tensor] | None = None,
    backwards: int = 1,
    compared: nn.Module | dict[str, nn.Module] | None = None,
    others: Sequence[Any] = (),
    **arguments: Any,
) -> Agreement:
    """Train a model for some steps, and return the finished Agreement.

    Args:
        model: The model. Default: a small one.
        optimizer: Its optimizer, or None for SGD.
        steps: Number of steps.
        change_loss: Returns the loss that is differentiated, from the step and the loss.
        before_step: Called before each `optimizer.step()`.
        after_step: Called after each `optimizer.step()`.
        zero: Sets the gradients to zero before each step. None leaves them.
        forward: Called in place of the model.
        backwards: Number of backward passes per step.
        compared: What is passed to `Agreement` in place of the model.
        others: As for `Agreement`.
        **arguments: Further arguments of `Agreement`.
    """
    torch.manual_seed(0)
    model = make_model() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    agreement = Agreement(model if compared is None else compared, optimizer, others=others, **arguments)
    steppers = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]
    for step in range(1, steps + 1):
        inputs, labels = torch.randn(10, 8), torch.randint(3, (10,))
        if zero is not None:
            for each in steppers:
                zero(each)
        for _ in range(backwards):
            loss = change_loss(step, nn.functional.cross_entropy((forward or model)(inputs).float(), labels))
            loss.backward()
        before_step(step)
        for each in steppers:
            each.step()
        after_step(step)
        agreement.step(batch=(inputs, labels), loss=loss)
    agreement.finish()
    agreement.close()
    return agreement


def codes(agreement: Agreement) -> list[str]:
    return [each.code for each in agreement.warnings]
