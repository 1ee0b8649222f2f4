"""torch's own classes by name, their keyword arguments checked against their signatures."""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from dreplica.errors import UsageError
from dreplica.section import Section, nearest


class _Component(Section):
    """A class of torch's by `name`; every further key is a keyword argument of that class."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments: everything but the name, without those left at null that the class should default."""
        declared = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
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
        _try("optim", self.name, self.arguments, lambda: build_optimizer(self, _any_model()))
        return self


class ScheduleConfig(_Component):
    """The learning-rate schedule: any of `torch.optim.lr_scheduler`'s by name, stepped once an epoch; further keys are
    its keyword arguments."""

    name: str | None = None
    """Class in `torch.optim.lr_scheduler`; null: a constant learning rate."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.name is not None or self.arguments:
            _try("schedule", str(self.name), self.arguments, lambda: build_scheduler(self, _any_optimizer()))
        return self


def build_criterion(config: CriterionConfig) -> nn.Module:
    """Raises UsageError if there is no such class or it has no such argument."""
    names = [name for name in dir(nn) if name.endswith("Loss")]
    return _construct("criterion", nn, config.name, names, config.arguments)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all parameters that require a gradient. Raises UsageError as `build_criterion`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "LBFGS":
        raise UsageError(
            "optim.name: 'LBFGS' wants a closure that evaluates the loss several times in a step, which "
            "this trainer does not give it. Use another optimizer, SGD for instance."
        )
    names = _classes(torch.optim, torch.optim.Optimizer)
    return _construct("optim", torch.optim, config.name, names, config.arguments, parameters)


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
    names = [name for name in _classes(schedulers, schedulers.LRScheduler) if name not in _SCHEDULERS_OF_OBJECTS]
    return _construct("schedule", schedulers, config.name, names, config.arguments, optimizer)


_SCHEDULERS_OF_OBJECTS = {"ChainedScheduler", "SequentialLR", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau"}
"""They take functions, other schedulers or a metric, none of which a config can express: use `replica.factory`."""


def _construct(
    section: str, module: ModuleType, name: str, names: list[str], arguments: Mapping[str, Any], *first: Any
) -> Any:
    if name not in names:
        raise UsageError(
            f"{section}.name: {module.__name__} has no {name!r} that a config can build. {nearest(name, names)}"
        )
    cls = getattr(module, name)
    parameters = inspect.signature(cls.__init__).parameters
    takes = [
        key for key in list(parameters)[1 + len(first) :] if parameters[key].kind is not parameters[key].VAR_KEYWORD
    ]
    for key in arguments:
        if key not in takes:
            raise UsageError(f"{section}.{key}: {name} has no argument {key!r}. {nearest(key, takes)}")
    missing = [
        key
        for key in takes
        if key not in arguments
        and parameters[key].default is inspect.Parameter.empty
        and parameters[key].kind is not inspect.Parameter.VAR_POSITIONAL
    ]
    if missing:
        raise UsageError(
            f"{section}.{missing[0]}: {name} needs a value for it. Set it in the config or with "
            f"--{section}.{missing[0]} VALUE."
        )
    return cls(*first, **arguments)


def _try(section: str, name: str, arguments: Mapping[str, Any], build: Callable[[], Any]) -> None:
    """Builds once to have the class itself judge its arguments; the global generators are not touched."""
    try:
        build()
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{section}.{key} = {value!r}" for key, value in arguments.items())
        raise UsageError(f"{section}: {name} does not take {given}: {str(error).splitlines()[0]}") from None


def _classes(module: ModuleType, base: type) -> list[str]:
    found = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    return [name for name in found if name != base.__name__ and not name.startswith("_")]


def _any_model() -> nn.Module:
    return nn.ParameterList([torch.zeros(2, 2)])


def _any_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(_any_model().parameters(), lr=0.1, momentum=0.9)
