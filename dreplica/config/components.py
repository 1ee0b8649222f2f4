"""Build criterion, optimizer and schedule from torch classes by name, with arguments checked against signatures."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from dreplica.config.messages import config_error, invalid_value
from dreplica.config.torch_class import construct
from dreplica.errors import UsageError


class Component(Protocol):
    """A config section that names a torch class and its keyword arguments."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class."""


class NamedComponent(Component, Protocol):
    """The sections `criterion` and `optim`."""

    @property
    def name(self) -> str:
        """Class name."""


class ScheduleComponent(Component, Protocol):
    """The section `schedule`."""

    @property
    def name(self) -> str | None:
        """Class name, or None for a constant learning rate."""

    @property
    def per(self) -> Literal["epoch", "step"]:
        """Event after which the schedule is stepped."""


# ---- Build


def build_criterion(config: NamedComponent) -> nn.Module:
    """Build the loss.

    A list of numbers for an argument that is a tensor (`weight`) becomes float32.

    Raises:
        UsageError: There is no such class, or it has no such argument.
    """
    names = [name for name in dir(nn) if name.endswith("Loss")]
    return construct("criterion", nn, config.name, names, _EXCLUDED_LOSSES, config.arguments)


def build_optimizer(config: NamedComponent, model: nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer over all parameters that require a gradient.

    Raises:
        UsageError: There is no such class, or it has no such argument.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = _classes(torch.optim, torch.optim.Optimizer)
    return construct("optim", torch.optim, config.name, names, _EXCLUDED_OPTIMIZERS, config.arguments, parameters)


def build_scheduler(config: ScheduleComponent, optimizer: torch.optim.Optimizer) -> Any:
    """Build a scheduler that drives `optimizer`.

    Returns:
        The scheduler, or None for a constant learning rate.

    Raises:
        UsageError: There is no such class, or it has no such argument.
    """
    if config.name is None:
        if config.arguments:
            raise config_error(
                "ignored-setting",
                f"schedule.{next(iter(config.arguments))}",
                "this argument has no effect because schedule.name is null",
                "Set schedule.name, such as StepLR.",
            )
        return None
    schedulers = torch.optim.lr_scheduler
    names = _classes(schedulers, schedulers.LRScheduler)
    return construct("schedule", schedulers, config.name, names, _EXCLUDED_SCHEDULERS, config.arguments, optimizer)


# ---- Try while validating the config: the class itself judges its arguments


def try_criterion(config: NamedComponent) -> None:
    """Build the loss once.

    Raises:
        UsageError: The class rejects an argument.
    """
    _try("criterion", config.name, config.arguments, lambda: build_criterion(config))


def try_optimizer(config: NamedComponent) -> None:
    """Build the optimizer once over a small model and step it.

    Raises:
        UsageError: The class rejects an argument.
    """
    _try("optim", config.name, config.arguments, lambda: _step_once(build_optimizer(config, _small_model())))


def try_schedule(config: ScheduleComponent) -> None:
    """Build the schedule once and step it.

    Raises:
        UsageError: The class rejects an argument.
    """
    _try("schedule", str(config.name), config.arguments, lambda: _run_schedule(config, 1))


# ---- Check once the data set, the device and the length of the run are known


def check_criterion(criterion: nn.Module, num_classes: int) -> None:
    """Check that the loss maps logits (batch, num_classes) and labels (batch,) to one number.

    Raises:
        UsageError: It does not.
    """
    name = type(criterion).__name__
    if getattr(criterion, "reduction", "mean") == "none":
        fix = "A training step needs one loss, not one for each sample."
        raise invalid_value("criterion.reduction", "none", "'mean' or 'sum'", fix)
    smoothing = getattr(criterion, "label_smoothing", 0.0)
    if not 0 <= smoothing <= 1:  # torch ignores a negative one
        raise invalid_value("criterion.label_smoothing", smoothing, "a value from 0 to 1")
    num_samples = num_classes + 1  # not num_classes, at which MSELoss would broadcast one against the other
    try:
        with warnings.catch_warnings(action="ignore"):
            criterion(torch.zeros(num_samples, num_classes), torch.zeros(num_samples, dtype=torch.int64))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise config_error(
            "unusable-class",
            "criterion",
            f"{name} does not accept logits (batch, {num_classes}) with class labels (batch,): {_first_line(error)}",
            "Use CrossEntropyLoss, with one weight per class if any, or return another criterion from replica.factory.",
            value=name,
        ) from None


def check_optimizer(section: str, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Check that a training step can step the optimizer.

    Args:
        section: Config section to name in the error.
        optimizer: The optimizer to check.
        device: Device of its parameters.

    Raises:
        UsageError: It needs a closure, or a GPU.
    """
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")  # a user's own `step` may take nothing
    if closure is not None and closure.default is inspect.Parameter.empty:
        problem = f"{name} needs a closure at each step, which a training step does not have"
        raise config_error("unusable-class", section, problem, "Use another optimizer.", value=name)
    if device.type == "cpu" and any(group.get("capturable") for group in optimizer.param_groups):
        fix = f"{name} is capturable only on a GPU, and this replica is on the CPU."
        raise invalid_value(f"{section}.capturable", True, "false", fix)


def check_schedule(config: ScheduleComponent, epochs: int, steps: int) -> None:
    """Check that the schedule can be stepped through the whole run.

    OneCycleLR, for instance, ends after `total_steps`.

    Args:
        config: The section `schedule`. Its `per` decides whether epochs or steps count.
        epochs: Number of epochs of the run.
        steps: Number of steps of the run, over all epochs.

    Raises:
        UsageError: It cannot.
    """
    try:
        _run_schedule(config, epochs if config.per == "epoch" else steps)
    except (ValueError, ArithmeticError) as error:
        raise config_error(
            "schedule-too-short",
            "schedule",
            f"{config.name} cannot be stepped for train.epochs = {epochs} epochs of {steps} steps in all: "
            f"{_first_line(error)}",
            f"It is stepped once each {config.per} (schedule.per).",
            value=config.name,
        ) from None


# ---- Classes that a config cannot build: why, and what to do instead

_THREE_TENSORS = (
    "compares more than two tensors, but the trainer passes (outputs, labels)",
    "Use CrossEntropyLoss, or return a criterion of two arguments from replica.factory.",
)
_TRAINABLE = (
    "has trainable weights, which the optimizer would not contain",
    "Put them into the model, and return both from replica.factory.",
)
_EXCLUDED_LOSSES = {
    "AdaptiveLogSoftmaxWithLoss": _TRAINABLE,
    "LinearCrossEntropyLoss": _TRAINABLE,
    "CTCLoss": _THREE_TENSORS,
    "CosineEmbeddingLoss": _THREE_TENSORS,
    "GaussianNLLLoss": _THREE_TENSORS,
    "MarginRankingLoss": _THREE_TENSORS,
    "TripletMarginLoss": _THREE_TENSORS,
    "TripletMarginWithDistanceLoss": _THREE_TENSORS,
}
_EXCLUDED_OPTIMIZERS = {
    "LBFGS": (
        "needs a closure that evaluates the loss several times in a step, which this trainer does not have",
        "Use another optimizer, such as SGD.",
    ),
    "SparseAdam": (
        "accepts only the sparse gradients of embedding layers",
        "Use Adam, or build it in a replica.factory.",
    ),
}
_FUNCTION = ("needs a function, which a config cannot contain", "Build it in a replica.factory.")
_SCHEDULERS = ("needs other schedulers, which a config cannot contain", "Build it in a replica.factory.")
_EXCLUDED_SCHEDULERS = {
    "LambdaLR": _FUNCTION,
    "MultiplicativeLR": _FUNCTION,
    "ChainedScheduler": _SCHEDULERS,
    "SequentialLR": _SCHEDULERS,
    "ReduceLROnPlateau": (
        "needs a metric, but schedules are stepped without one",
        "Use another schedule, such as CosineAnnealingLR.",
    ),
}


def _try(section: str, name: str, arguments: Mapping[str, Any], build: Callable[[], Any]) -> None:
    """Call `build` and turn what torch raises into a UsageError. The global generators are not touched."""
    try:
        build()
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{section}.{key} = {value!r}" for key, value in arguments.items())
        problem = f"{name} rejects {given}: {_first_line(error)}"
        raise config_error("rejected-value", section, problem, value=dict(arguments)) from None


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)  # str() would quote a key
    return (text.splitlines() or [type(error).__name__])[0].removesuffix(".")


def _classes(module: ModuleType, base: type) -> list[str]:
    found = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    return [name for name in found if name != base.__name__ and not name.startswith("_")]


def _small_model() -> nn.Module:
    return nn.ParameterList([torch.zeros(2, 2)])


def _small_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(_small_model().parameters(), lr=0.1, momentum=0.9)


def _step_once(optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer once: torch checks some arguments only then."""
    (group,) = optimizer.param_groups
    if group.get("capturable"):  # only on a GPU, which is not known yet
        return
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _run_schedule(config: ScheduleComponent, epochs: int) -> None:
    """Take the first and the last of `epochs` steps.

    A schedule that ends, or a power that overflows, fails at the last step if it fails at any.
    """
    optimizer = _small_optimizer()
    scheduler = build_scheduler(config, optimizer)
    if scheduler is None:
        return
    optimizer.step()  # does nothing; a scheduler warns if there was none
    scheduler.step()
    if epochs > 1:
        scheduler.last_epoch = epochs - 1
        scheduler.step()
