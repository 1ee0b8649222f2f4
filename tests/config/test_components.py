"""torch classes by name: each one is built, or the error says why not and what to use instead."""

import contextlib
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dreplica.config.base import Section
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

schedulers = torch.optim.lr_scheduler

NUM_CLASSES = 5
LOSSES = [name for name in vars(nn) if name.endswith("Loss")]
OPTIMIZERS = [
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
]
SCHEDULERS = [
    name
    for name, value in vars(schedulers).items()
    if isinstance(value, type)
    and issubclass(value, schedulers.LRScheduler)
    and value is not schedulers.LRScheduler
    and not name.startswith("_")
]
CLASSIFICATION_LOSSES = ["CrossEntropyLoss", "MultiMarginLoss", "NLLLoss"]
NOT_BUILT = {
    "AdaptiveLogSoftmaxWithLoss": "trainable weights",
    "LinearCrossEntropyLoss": "trainable weights",
    "CTCLoss": "more than two tensors",
    "CosineEmbeddingLoss": "more than two tensors",
    "GaussianNLLLoss": "more than two tensors",
    "MarginRankingLoss": "more than two tensors",
    "TripletMarginLoss": "more than two tensors",
    "TripletMarginWithDistanceLoss": "more than two tensors",
    "LBFGS": "closure",
    "SparseAdam": "sparse gradients",
    "LambdaLR": "function",
    "MultiplicativeLR": "function",
    "ChainedScheduler": "other schedulers",
    "SequentialLR": "other schedulers",
    "ReduceLROnPlateau": "metric",
}
REQUIRED: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 4]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
}
"""Required arguments of classes that have some."""


def refusal(section: type[Section], values: Mapping[str, Any]) -> UsageError:
    """Return the error of an invalid section."""
    with pytest.raises(ValidationError) as caught:
        section.model_validate(dict(values))
    (error,) = caught.value.errors()
    cause = error["ctx"]["error"]
    assert isinstance(cause, UsageError)
    assert "\n" not in str(cause)
    return cause


def message(section: type[Section], values: Mapping[str, Any]) -> str:
    return str(refusal(section, values))


def built(names: list[str]) -> list[str]:
    return [name for name in names if name not in NOT_BUILT]


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


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_argument_error_names_key(name: str) -> None:
    key = next(iter(REQUIRED[name]))
    text = message(ScheduleConfig, {"name": name})
    if name == "OneCycleLR":
        assert text.startswith("schedule.max_lr: OneCycleLR requires a value")
        text = message(ScheduleConfig, {"name": name, "max_lr": 0.1})
        assert "total_steps" in text
    else:
        assert text.startswith(f"schedule.{key}: {name} requires a value")
        assert f"--schedule.{key} VALUE" in text


@pytest.mark.parametrize(
    ("section", "name"),
    [(CriterionConfig, name) for name in built(LOSSES)]
    + [(OptimConfig, name) for name in built(OPTIMIZERS)]
    + [(ScheduleConfig, name) for name in built(SCHEDULERS)],
)
def test_unknown_argument_error_suggests_nearest(section: type[Section], name: str) -> None:
    prefix, near, wrong = {
        CriterionConfig: ("criterion", "reduction", "reductoin"),
        OptimConfig: ("optim", "weight_decay", "weigth_decay"),
        ScheduleConfig: ("schedule", "last_epoch", "last_epok"),
    }[section]
    if name == "Rprop":
        near, wrong = ("maximize", "maximise")
    text = message(section, {"name": name, **REQUIRED.get(name, {}), wrong: 1})
    assert text.startswith(f"{prefix}.{wrong}: {name} has no argument {wrong!r}.")
    assert f"Did you mean {near!r}?" in text


@pytest.mark.parametrize("name", NOT_BUILT)
def test_unusable_class_error_names_an_alternative(name: str) -> None:
    section: type[Section] = CriterionConfig
    prefix = "criterion"
    if name in OPTIMIZERS:
        section, prefix = OptimConfig, "optim"
    if name in SCHEDULERS:
        section, prefix = ScheduleConfig, "schedule"
    text = message(section, {"name": name})
    assert text.startswith(f"{prefix}.name: {name} ")
    assert NOT_BUILT[name] in text
    assert "replica.factory" in text or "Use " in text


@pytest.mark.parametrize(
    ("section", "name", "near"),
    [
        (CriterionConfig, "CrossEntropy", "CrossEntropyLoss"),
        (OptimConfig, "adamw", "AdamW"),
        (OptimConfig, "Optimizer", "Choose one of"),
        (ScheduleConfig, "CosineAnealingLR", "CosineAnnealingLR"),
        (ScheduleConfig, "LRScheduler", "LR"),
        (ScheduleConfig, "Optimizer", "Choose one of"),
        (CriterionConfig, "Linear", "Choose one of"),
    ],
)
def test_unknown_class_error_suggests_nearest(section: type[Section], name: str, near: str) -> None:
    text = message(section, {"name": name})
    assert f"has no {name!r}." in text
    assert near in text


def test_suggestion_is_never_an_unusable_class() -> None:
    for name in NOT_BUILT:
        section: type[Section] = CriterionConfig
        if name in {*OPTIMIZERS, *SCHEDULERS}:
            section = OptimConfig if name in OPTIMIZERS else ScheduleConfig
        assert repr(name) not in message(section, {"name": name + "x"}).split("has no", 1)[1].split(".", 1)[1]


@pytest.mark.parametrize(
    ("section", "values", "part"),
    [
        (OptimConfig, {"name": "SGD", "momentum": -1}, "optim.momentum = -1: Invalid momentum"),
        (OptimConfig, {"name": "SGD", "nesterov": True}, "optim.nesterov = True: Nesterov"),
        (
            OptimConfig,
            {"name": "Adam", "betas": "x"},
            "optim.betas: expected a list of 2 values, such as [0.9, 0.999], got 'x'.",
        ),
        (
            OptimConfig,
            {"name": "Adam", "betas": [0.9]},
            "optim.betas: expected a list of 2 values, such as [0.9, 0.999], got [0.9].",
        ),
        (
            OptimConfig,
            {"name": "Adam", "betas": [0.9, 0.99, 0.999]},
            "expected a list of 2 values, such as [0.9, 0.999], got [0.9, 0.99, 0.999].",
        ),
        (
            OptimConfig,
            {"name": "Adafactor", "eps": [0.1]},
            "expected a list of 2 values, such as [null, 0.001], got [0.1].",
        ),
        (OptimConfig, {"name": "SGD", "momentum": True}, "optim.momentum: expected a number, got true."),
        (OptimConfig, {"name": "SGD", "momentum": float("nan")}, "momentum: expected a finite number, got nan."),
        (OptimConfig, {"name": "SGD", "foreach": "no"}, "optim.foreach: expected true or false, got 'no'."),
        (OptimConfig, {"name": "Adam", "fused": 1}, "optim.fused: expected true or false, got 1."),
        (ScheduleConfig, {"name": "CosineAnnealingLR", "T_max": 1.5}, "T_max: expected an integer, got 1.5."),
        (
            ScheduleConfig,
            {"name": "MultiStepLR", "milestones": "ab"},
            "expected a list of integers, such as [1, 2], got 'ab'.",
        ),
        (
            ScheduleConfig,
            {"name": "MultiStepLR", "milestones": [1, "b"]},
            "expected a list of integers, such as [1, 2], got [1, 'b'].",
        ),
        (
            ScheduleConfig,
            {"name": "MultiStepLR", "milestones": 3},
            "expected a list of integers, such as [1, 2], got 3.",
        ),
        (OptimConfig, {"name": "SGD", "nesterov": 1}, "optim.nesterov: expected true or false, got 1."),
        (
            ScheduleConfig,
            {"name": "StepLR", "step_size": 3, "gamma": "big"},
            "schedule.gamma: expected a number, got 'big'.",
        ),
        (
            ScheduleConfig,
            {"name": "ExponentialLR", "gamma": "big"},
            "schedule.gamma: expected a number, got 'big'.",
        ),
        (
            ScheduleConfig,
            {"name": "ExponentialLR", "gamma": float("inf")},
            "schedule.gamma: expected a finite number, got inf.",
        ),
        (ScheduleConfig, {"name": "StepLR", "step_size": 1, "last_epoch": 5}, "last_epoch = 5: param 'initial_lr' is"),
        (CriterionConfig, {"reduction": 3}, "criterion.reduction: expected text, such as 'mean', got 3."),
        (
            CriterionConfig,
            {"weight": [1.0, float("nan")]},
            "criterion.weight: expected a list of finite numbers, one per class",
        ),
        (
            ScheduleConfig,
            {"name": "StepLR", "step_size": "many"},
            "schedule.step_size: expected an integer, got 'many'.",
        ),
        (ScheduleConfig, {"name": "StepLR", "step_size": 0}, "schedule.step_size = 0"),
        (ScheduleConfig, {"name": "CosineAnnealingLR", "T_max": 0}, "schedule.T_max = 0"),
        (OptimConfig, {"name": "AdamW", "differentiable": True}, "optim.differentiable = True"),
        (OptimConfig, {"name": "SGD", "momentum": "high"}, "optim.momentum: expected a number, got 'high'."),
        (ScheduleConfig, {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0, "mode": "x"}, "schedule.mode = 'x'"),
        (
            ScheduleConfig,
            {"step_size": 3},
            "schedule.step_size: this argument has no effect because schedule.name is null",
        ),
        (CriterionConfig, {"weight": "balanced"}, "criterion.weight: expected a list of finite numbers, one per class"),
        (CriterionConfig, {"weight": [1.0, "x"]}, "criterion.weight: expected a list of finite numbers, one per class"),
        (CriterionConfig, {"weight": [True]}, "criterion.weight: expected a list of finite numbers, one per class"),
        (
            CriterionConfig,
            {"label_smoothing": 2.0},
            "criterion.label_smoothing: expected a value from 0 to 1, got 2.0.",
        ),
        (
            CriterionConfig,
            {"label_smoothing": -0.1},
            "criterion.label_smoothing: expected a value from 0 to 1, got -0.1.",
        ),
    ],
)
def test_invalid_argument_error_names_key_and_value(section: type[Section], values: dict[str, Any], part: str) -> None:
    config = dict(values)
    if "label_smoothing" in values:  # judged at the first call, so by the check that calls it
        with pytest.raises(UsageError, match=re.escape(part)):
            check_criterion(build_criterion(CriterionConfig.model_validate(config)), NUM_CLASSES)
    else:
        assert part in message(section, config)


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


def test_check_optimizer_refuses_capturable_on_cpu() -> None:
    optimizer = build_optimizer(OptimConfig.model_validate({"name": "Adam", "capturable": True}), some_model())
    check_optimizer("optim", optimizer, torch.device("cuda", 0))
    with pytest.raises(UsageError, match=r"^optim\.capturable: expected false, got true\. Adam .* GPU, .* CPU\.$"):
        check_optimizer("optim", optimizer, torch.device("cpu"))


@pytest.mark.parametrize("name", built(OPTIMIZERS))
def test_check_optimizer_accepts_each_optimizer(name: str) -> None:
    check_optimizer("optim", build_optimizer(OptimConfig(name=name), some_model()), torch.device("cpu"))
