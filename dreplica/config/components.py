"""torch's own classes by name, their keyword arguments checked against their signatures."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from dreplica.config.base import Section
from dreplica.config.torch_class import construct
from dreplica.errors import UsageError


class _Component(Section):
    """A class of torch's by `name`; every further key is a keyword argument of that class."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments: the section's other keys, without those at null that the class should default."""
        declared = {name: getattr(self, name) for name in type(self).model_fields if name not in ("name", "per")}
        return {key: value for key, value in declared.items() if value is not None} | (self.model_extra or {})


class CriterionConfig(_Component):
    """The loss: any of `torch.nn`'s by name; further keys are its keyword arguments."""

    name: str = "CrossEntropyLoss"
    """Class in `torch.nn`, called with (outputs, labels)."""

    @model_validator(mode="after")
    def _check(self) -> "CriterionConfig":
        _try("criterion", self.name, self.arguments, lambda: build_criterion(self))
        return self


class OptimConfig(_Component):
    """The optimizer: any of `torch.optim`'s by name; further keys are its keyword arguments."""

    name: str = "SGD"
    """Class in `torch.optim`."""
    lr: float = Field(0.01, ge=0)
    """Learning rate."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        _try("optim", self.name, self.arguments, lambda: _step_once(build_optimizer(self, _any_model())))
        return self


class ScheduleConfig(_Component):
    """The learning-rate schedule: any of `torch.optim.lr_scheduler`'s by name; further keys are its keyword
    arguments."""

    name: str | None = None
    """Class in `torch.optim.lr_scheduler`; null: a constant learning rate."""
    per: Literal["epoch", "step"] = "epoch"
    """Stepped once an `epoch`, or after each `step` of the optimizer, as a warm-up or OneCycleLR wants it."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.name is not None or self.arguments:
            _try("schedule", str(self.name), self.arguments, lambda: _run_schedule(self, 1))
        return self


def build_criterion(config: CriterionConfig) -> nn.Module:
    """The loss; a list of numbers given for an argument that is a tensor (`weight`) becomes float32.

    Raises UsageError if there is no such class or it has no such argument.
    """
    names = [name for name in dir(nn) if name.endswith("Loss")]
    return construct("criterion", nn, config.name, names, _NOT_LOSSES_OF_LOGITS, config.arguments)


def check_criterion(criterion: nn.Module, num_classes: int) -> None:
    """Raises UsageError unless it takes logits (batch, num_classes) and labels (batch,) and returns one number."""
    name = type(criterion).__name__
    if getattr(criterion, "reduction", "mean") == "none":
        raise UsageError(
            "criterion.reduction: 'none' leaves a loss for each sample, and a step needs one. Use 'mean' or 'sum'."
        )
    smoothing = getattr(criterion, "label_smoothing", 0.0)
    if not 0 <= smoothing <= 1:  # torch ignores a negative one
        raise UsageError(f"criterion.label_smoothing: {smoothing} will not do: it should lie between 0 and 1.")
    num_samples = num_classes + 1  # not num_classes, at which MSELoss would broadcast one against the other
    try:
        with warnings.catch_warnings(action="ignore"):
            criterion(torch.zeros(num_samples, num_classes), torch.zeros(num_samples, dtype=torch.int64))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UsageError(
            f"criterion: {name} does not take logits (batch, {num_classes}) with class labels (batch,): "
            f"{_first_line(error)}. CrossEntropyLoss does, with one weight per class if any; for another pairing, "
            "return a criterion of yours from replica.factory."
        ) from None


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all parameters that require a gradient. Raises UsageError as `build_criterion`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = _classes(torch.optim, torch.optim.Optimizer)
    return construct("optim", torch.optim, config.name, names, _NOT_OPTIMIZERS_OF_A_STEP, config.arguments, parameters)


def build_scheduler(config: ScheduleConfig, optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler that drives `optimizer`, or None. Raises UsageError as `build_criterion`."""
    if config.name is None:
        if config.arguments:
            raise UsageError(
                f"schedule.{next(iter(config.arguments))}: there is no schedule that takes it. "
                "Set schedule.name, to StepLR for instance."
            )
        return None
    schedulers = torch.optim.lr_scheduler
    names = _classes(schedulers, schedulers.LRScheduler)
    return construct("schedule", schedulers, config.name, names, _NOT_SCHEDULERS_OF_VALUES, config.arguments, optimizer)


def check_optimizer(section: str, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raises UsageError if it cannot be stepped as a training step does, on `device`."""
    name = type(optimizer).__name__
    if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
        raise UsageError(f"{section}: {name} wants a closure at each step, and a training step has none. Use another.")
    if device.type == "cpu" and any(group.get("capturable") for group in optimizer.param_groups):
        raise UsageError(
            f"{section}.capturable: True will not do: {name} is capturable on a GPU alone, and this replica is on the "
            "CPU. Leave it out."
        )


def check_schedule(config: ScheduleConfig, epochs: int, steps: int) -> None:
    """Raises UsageError if the schedule cannot be stepped so often: OneCycleLR ends after `total_steps`.

    `epochs`, `steps`: how many there are in the whole run; which of them count is `per`'s to say.
    """
    try:
        _run_schedule(config, epochs if config.per == "epoch" else steps)
    except (ValueError, ArithmeticError) as error:
        raise UsageError(
            f"schedule: {config.name} cannot be stepped for train.epochs = {epochs} epochs of {steps} steps in all: "
            f"{_first_line(error)}. It is stepped once each {config.per} (schedule.per)."
        ) from None


_THREE = (
    "compares more than two tensors, and the trainer gives it (outputs, labels). Use CrossEntropyLoss, or return a "
    "criterion of two arguments from replica.factory."
)
_OWN_WEIGHTS = (
    "has trainable weights of its own, which the optimizer would not hold. Put them into the model, and return "
    "both from replica.factory."
)
_NOT_LOSSES_OF_LOGITS = {
    "AdaptiveLogSoftmaxWithLoss": _OWN_WEIGHTS,
    "LinearCrossEntropyLoss": _OWN_WEIGHTS,
    "CTCLoss": _THREE,
    "CosineEmbeddingLoss": _THREE,
    "GaussianNLLLoss": _THREE,
    "MarginRankingLoss": _THREE,
    "TripletMarginLoss": _THREE,
    "TripletMarginWithDistanceLoss": _THREE,
}
_NOT_OPTIMIZERS_OF_A_STEP = {
    "LBFGS": "wants a closure that evaluates the loss several times in a step, which this trainer does not give it. "
    "Use another optimizer, SGD for instance.",
    "SparseAdam": "takes only the sparse gradients of embedding layers. Use Adam, or build it in a replica.factory.",
}
_FUNCTION = "takes a function, which a config cannot hold. Build it in a replica.factory."
_NOT_SCHEDULERS_OF_VALUES = {
    "LambdaLR": _FUNCTION,
    "MultiplicativeLR": _FUNCTION,
    "ChainedScheduler": "takes other schedulers, which a config cannot hold. Build it in a replica.factory.",
    "SequentialLR": "takes other schedulers, which a config cannot hold. Build it in a replica.factory.",
    "ReduceLROnPlateau": "waits for a metric, and schedules are stepped without one. Use another, "
    "CosineAnnealingLR for instance.",
}
"""Classes of torch's that a config cannot build, why, and what to do instead."""


def _try(section: str, name: str, arguments: Mapping[str, Any], build: Callable[[], Any]) -> None:
    """Builds and steps once to have the class itself judge its arguments; the global generators are not touched."""
    try:
        build()
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{section}.{key} = {value!r}" for key, value in arguments.items())
        raise UsageError(f"{section}: {name} does not take {given}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # str() would quote a key
    return (text.splitlines() or [type(error).__name__])[0].removesuffix(".")


def _classes(module: ModuleType, base: type) -> list[str]:
    found = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    return [name for name in found if name != base.__name__ and not name.startswith("_")]


def _any_model() -> nn.Module:
    return nn.ParameterList([torch.zeros(2, 2)])


def _any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(_any_model().parameters(), lr=0.1, momentum=0.9)


def _step_once(optimizer: torch.optim.Optimizer) -> None:
    """Some arguments are first looked at in a step."""
    (group,) = optimizer.param_groups
    if group.get("capturable"):  # only on a GPU, which is not known yet
        return
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _run_schedule(config: ScheduleConfig, epochs: int) -> None:
    """The first and the last of `epochs` steps: one that has an end, or a power that overflows, fails from there on."""
    optimizer = _any_optimizer()
    scheduler = build_scheduler(config, optimizer)
    if scheduler is None:
        return
    optimizer.step()  # does nothing; a scheduler warns if there was none
    scheduler.step()
    if epochs > 1:
        scheduler.last_epoch = epochs - 1
        scheduler.step()
