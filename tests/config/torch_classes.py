"""Names of torch classes, as tests of config sections need them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dreplica.config.base import Section
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
