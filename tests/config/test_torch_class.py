"""Arguments of torch classes: unknown, missing and invalid ones are refused with the key and a hint."""

import re
from typing import Any

import pytest

from dreplica.config.base import Section
from dreplica.config.components import build_criterion, check_criterion
from dreplica.config.schema import CriterionConfig, OptimConfig, ScheduleConfig
from dreplica.errors import UsageError
from tests.config.torch_classes import (
    LOSSES,
    NOT_BUILT,
    NUM_CLASSES,
    OPTIMIZERS,
    REQUIRED,
    SCHEDULERS,
    built,
    message,
)


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
