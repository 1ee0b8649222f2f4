"""torch classes by name: each one is built, or the error says why not and what to use instead."""

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dreplica.config.components import (
    build_criterion,
    build_optimizer,
    build_scheduler,
    check_criterion,
    check_optimizer,
    check_schedule,
)
from dreplica.config.schema import CriterionConfig, OptimConfig, ScheduleConfig
from dreplica.errors import UsageError
from tests.config.torch_classes import (
    CLASSIFICATION_LOSSES,
    LOSSES,
    NOT_BUILT,
    NUM_CLASSES,
    OPTIMIZERS,
    REQUIRED,
    SCHEDULERS,
    built,
)

schedulers = torch.optim.lr_scheduler


def some_model() -> nn.Module:
    return nn.Linear(3, NUM_CLASSES, bias=False)


def test_torch_has_the_classes_listed_here() -> None:
    assert set(NOT_BUILT) | set(REQUIRED) | set(CLASSIFICATION_LOSSES) <= {*LOSSES, *OPTIMIZERS, *SCHEDULERS}
    assert {"SGD", "AdamW", "Muon"} <= set(built(OPTIMIZERS))


@pytest.mark.parametrize("name", built(LOSSES))
def test_build_criterion_builds_each_loss_of_two_tensors(name: str) -> None:
    assert type(build_criterion(CriterionConfig(name=name))) is getattr(nn, name)


@pytest.mark.parametrize("name", built(OPTIMIZERS))
def test_build_optimizer_builds_each_optimizer(name: str) -> None:
    model = some_model()
    optimizer = build_optimizer(OptimConfig.model_validate({"name": name, "lr": 0.5}), model)
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", built(SCHEDULERS))
def test_build_scheduler_builds_each_scheduler_of_values(name: str) -> None:
    optimizer = torch.optim.SGD(some_model().parameters(), lr=0.1, momentum=0.9)
    scheduler = build_scheduler(ScheduleConfig.model_validate({"name": name, **REQUIRED.get(name, {})}), optimizer)
    assert type(scheduler) is getattr(schedulers, name)
    assert scheduler.optimizer is optimizer
    optimizer.step()
    scheduler.step()


def test_class_weights_become_a_tensor() -> None:
    config = CriterionConfig.model_validate({"weight": [1, 2.5, 0, 1, 1]})
    criterion = build_criterion(config)
    assert torch.equal(criterion.weight, torch.tensor([1, 2.5, 0, 1, 1], dtype=torch.float32))
    check_criterion(criterion, NUM_CLASSES)
    assert config.model_dump()["weight"] == [1, 2.5, 0, 1, 1]
    assert build_criterion(CriterionConfig.model_validate({"weight": None})).weight is None


def test_check_criterion_counts_class_weights() -> None:
    criterion = build_criterion(CriterionConfig.model_validate({"weight": [1, 2]}))
    with pytest.raises(UsageError, match=r"all 5 classes.*one weight per class"):
        check_criterion(criterion, NUM_CLASSES)


@pytest.mark.parametrize("name", built(LOSSES))
@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.filterwarnings("error")
def test_check_criterion_refuses_loss_without_class_labels(name: str, num_classes: int) -> None:
    criterion = build_criterion(CriterionConfig(name=name))
    if name in CLASSIFICATION_LOSSES:
        check_criterion(criterion, num_classes)
    else:
        with pytest.raises(UsageError, match=f"^criterion: {name} does not accept .*Use CrossEntropyLoss"):
            check_criterion(criterion, num_classes)


def test_check_criterion_refuses_loss_without_reduction() -> None:
    criterion = build_criterion(CriterionConfig.model_validate({"reduction": "none"}))
    with pytest.raises(UsageError, match=r"criterion\.reduction: expected 'mean' or 'sum', got 'none'"):
        check_criterion(criterion, NUM_CLASSES)
    check_criterion(build_criterion(CriterionConfig.model_validate({"reduction": "sum"})), NUM_CLASSES)


def generators() -> tuple[Any, ...]:
    return random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize(
    "act",
    [lambda name=name: CriterionConfig(name=name) for name in LOSSES]
    + [lambda name=name: OptimConfig(name=name) for name in OPTIMIZERS]
    + [lambda name=name: ScheduleConfig.model_validate({"name": name, **REQUIRED.get(name, {})}) for name in SCHEDULERS]
    + [lambda: check_criterion(nn.CrossEntropyLoss(), 3)],
)
def test_validation_preserves_global_generators(act: Callable[[], Any]) -> None:
    before = generators()
    with contextlib.suppress(ValidationError):
        act()
    assert generators() == before
    torch.rand(1)
    assert generators() != before


def test_build_optimizer_takes_only_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(OptimConfig(), model).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model[1].parameters()]


def test_check_schedule_refuses_schedule_shorter_than_run() -> None:
    config = ScheduleConfig.model_validate({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 4})
    check_schedule(config, epochs=4, steps=40)
    with pytest.raises(UsageError, match=r"schedule: OneCycleLR .* train\.epochs = 5 .*once each epoch"):
        check_schedule(config, epochs=5, steps=5)
    by_step = config.model_copy(update={"per": "step"})
    check_schedule(by_step, epochs=5, steps=4)
    with pytest.raises(UsageError, match=r"schedule: OneCycleLR .* 5 steps .*once each step"):
        check_schedule(by_step, epochs=1, steps=5)
    check_schedule(ScheduleConfig(), epochs=5, steps=5)


@pytest.mark.parametrize("name", built(SCHEDULERS))
def test_check_schedule_agrees_with_stepping(name: str) -> None:
    config = ScheduleConfig.model_validate({"name": name, **REQUIRED.get(name, {})})
    for epochs in (1, 2, 9, 10, 11, 30):
        optimizer = torch.optim.SGD(some_model().parameters(), lr=0.1, momentum=0.9)
        scheduler, judged, stepped = build_scheduler(config, optimizer), True, True
        try:
            for _ in range(epochs):
                optimizer.step()
                scheduler.step()
        except ValueError:
            stepped = False
        try:
            check_schedule(config, epochs, epochs)
        except UsageError:
            judged = False
        assert judged == stepped
        assert stepped or name == "OneCycleLR"


def test_check_schedule_takes_constant_time() -> None:
    started = time.process_time()
    check_schedule(ScheduleConfig.model_validate({"name": "StepLR", "step_size": 3}), epochs=10**12, steps=10**12)
    assert time.process_time() - started < 1.0


def test_check_schedule_refuses_overflow_in_mid_run() -> None:
    values = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0, "mode": "exp_range", "gamma": 10.0}
    config = ScheduleConfig.model_validate(values)
    check_schedule(config, epochs=100, steps=100)
    with pytest.raises(UsageError, match=r"^schedule: CyclicLR cannot be stepped for train\.epochs = 400 "):
        check_schedule(config, epochs=400, steps=400)


def test_check_optimizer_accepts_step_without_closure() -> None:
    class Own(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    check_optimizer("optim", Own(some_model().parameters(), lr=0.1), torch.device("cpu"))


def test_check_optimizer_refuses_capturable_on_cpu() -> None:
    optimizer = build_optimizer(OptimConfig.model_validate({"name": "Adam", "capturable": True}), some_model())
    check_optimizer("optim", optimizer, torch.device("cuda", 0))
    with pytest.raises(UsageError, match=r"^optim\.capturable: expected false, got true\. Adam .* GPU, .* CPU\.$"):
        check_optimizer("optim", optimizer, torch.device("cpu"))


@pytest.mark.parametrize("name", built(OPTIMIZERS))
def test_check_optimizer_accepts_each_optimizer(name: str) -> None:
    check_optimizer("optim", build_optimizer(OptimConfig(name=name), some_model()), torch.device("cpu"))
