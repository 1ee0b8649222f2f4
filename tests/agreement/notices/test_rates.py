"""The warning about a learning rate of 0: only where it stays 0, not for a warm-up or the last steps of a schedule."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dreplica.agreement.notices.rates import RateWatch
from tests.agreement.notices.loop import make_model, sgd, train

schedulers = torch.optim.lr_scheduler


@pytest.fixture(autouse=True)
def _scheduler_order() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(make: Callable[[Any], Any], steps: int, lr: float = 0.1, per: int = 1) -> list[tuple[int, int]]:
    """Return the end and beginning of each warning, for a schedule that steps every `per` steps.

    An end of 0 is at the finish.
    """
    optimizer = sgd(make_model(), lr=lr)
    scheduler = make(optimizer)
    watch = RateWatch({"": optimizer})
    found: list[tuple[int, int]] = []
    for step in range(1, steps + 1):
        if scheduler is not None and step % per == 0:
            scheduler.step()
        found += [(step, each.data["since"]) for each in watch.step(step)]
    return found + [(0, each.data["since"]) for each in watch.finish()]


CLEAN: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "constant": (lambda optimizer: None, 200, 1),
    "warm-up from 0": (lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / 50)), 200, 1),
    "warm-up from 0 per epoch": (lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: epoch / 5), 200, 60),
    "cosine to 0": (lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=200), 200, 1),
    "linear to 0": (lambda optimizer: schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=200), 200, 1),
    "cosine with restarts": (lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 10), 200, 1),
    "cyclic": (lambda optimizer: schedulers.CyclicLR(optimizer, 0.0, 0.1, step_size_up=10), 200, 1),
    "unknown rate": (lambda optimizer: optimizer.param_groups[0].update(lr=None), 200, 1),
}


@pytest.mark.parametrize("name", CLEAN)
def test_schedule_gives_no_warning(name: str) -> None:
    make, steps, per = CLEAN[name]
    assert run(make, steps, per=per) == []


def test_rate_that_stays_zero_after_schedule_ended() -> None:
    """A linear schedule of 50 steps in a run of 200."""
    found = run(lambda optimizer: schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=50), 200)
    assert found == [(69, 50)]


def test_rate_of_zero_that_no_scheduler_can_raise() -> None:
    assert run(lambda optimizer: schedulers.StepLR(optimizer, 10), 200, lr=0.0) == [(20, 1)]
    assert run(lambda optimizer: None, 200, lr=0.0) == [(100, 1)]


def test_scheduler_that_never_raises_the_rate() -> None:
    assert run(lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.0), 200) == [(0, 1)]
    assert run(lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.0), 10) == []


def test_rate_set_to_zero_by_hand() -> None:
    model = make_model()
    optimizer = sgd(model)
    agreement = train(model, optimizer, after_step=lambda step: optimizer.param_groups[0].update(lr=0.1 * (step < 5)))
    (found,) = agreement.warnings
    assert (found.code, found.data["since"], found.data["steps"]) == ("learning-rate-zero", 5, 20)


def test_one_group_with_a_rate_gives_no_warning() -> None:
    model = make_model()
    watch = RateWatch(
        {"": torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1.0}], lr=0.0)}
    )
    assert not any(watch.step(step) for step in range(1, 300))
    assert not watch.finish()


def test_rate_in_tensor_is_read_on_cpu_only() -> None:
    model = make_model()
    watch = RateWatch({"": sgd(model, lr=torch.tensor(0.0), foreach=False)})
    assert any(watch.step(step) for step in range(1, 300))
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0, device="meta")
    elsewhere = RateWatch({"": optimizer})
    assert not any(elsewhere.step(step) for step in range(1, 300))
