"""Checks of what the functions of a user return, `model.factory` and `replica.factory`, and of what they read."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dreplica.config.components import check_optimizer
from dreplica.config.ignored import ignored_setting
from dreplica.config.reads import Reads
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError
from dreplica.state.replica import Replica


def check_factory(path: str, replica: object, device: torch.device) -> Replica:
    """Return what a `replica.factory` returned, after checking that the trainer can train it.

    Args:
        path: The function that `replica.factory` names.
        replica: What it returned.
        device: The device to train on.

    Raises:
        UsageError: The trainer cannot train it.
    """
    key = "replica.factory"
    if not isinstance(replica, Replica):
        raise factory_error(
            key,
            f"{path!r} returned {type(replica).__name__}. "
            "Return dreplica.Replica(model=, criterion=, optimizer=, scheduler=).",
        )
    for name, kind, hint in _PARTS:
        part = getattr(replica, name)
        if not isinstance(part, kind):
            found = "a function" if inspect.isfunction(part) else "None" if part is None else type(part).__name__
            raise factory_error(key, f"the {name} that {path!r} returned is {found}. {hint}", part=name)
    check_optimizer(key, replica.optimizer, device)
    check_initialized(key, replica.model)
    scheduler = replica.scheduler
    if scheduler is not None and not (hasattr(scheduler, "step") and hasattr(scheduler, "state_dict")):
        raise factory_error(
            key,
            f"the scheduler that {path!r} returned is {type(scheduler).__name__}, which has no step or no state_dict. "
            "Return a scheduler of torch.optim.lr_scheduler, or None.",
            part="scheduler",
        )
    if replica.scheduler_per not in ("epoch", "step"):
        raise factory_error(
            key,
            f"the replica that {path!r} returned has scheduler_per={replica.scheduler_per!r}. "
            "Set it to 'epoch' or 'step'.",
            part="scheduler_per",
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise factory_error(
            key,
            f"the scheduler that {path!r} returned is a ReduceLROnPlateau, which waits for a metric, but the trainer "
            "steps schedulers without one. Use another, for instance CosineAnnealingLR.",
            part="scheduler",
        )
    return replica


def check_read(config: RunConfig, reads: Reads) -> None:
    """Check that a `replica.factory` has read the settings of what it replaces.

    Args:
        config: The config of the replica.
        reads: The settings that the function has read.

    Raises:
        UsageError: It has not read a setting that the user has chosen.
    """
    unread = reads.unread(key for key in config.given if key.partition(".")[0] in _REPLACED and key not in _USED_ANYWAY)
    if unread:
        them = "it" if len(unread) == 1 else "them"
        reason = f"replica.factory is {config.replica.factory!r}, which does not read {them}"
        raise ignored_setting(unread, reason, f"Remove {them}, or use config.{unread[0]} in the function.")


_REPLACED = {"model", "criterion", "optim", "schedule"}
"""Sections that a `replica.factory` replaces, and may read."""
_USED_ANYWAY = {"model.num_classes", "model.init", "model.channels_last"}
"""Keys of these sections that the trainer uses with a `replica.factory`, too."""

_PARTS: tuple[tuple[str, type, str], ...] = (
    ("model", nn.Module, "Return an nn.Module."),
    ("criterion", nn.Module, "Return an nn.Module, for instance torch.nn.CrossEntropyLoss(): it may hold state, too."),
    ("optimizer", torch.optim.Optimizer, "Return an optimizer of torch.optim over the model's parameters."),
)
"""Attribute, required type and hint of each part that a `replica.factory` must return."""


def check_initialized(key: str, model: nn.Module) -> None:
    """Check that a model has no lazy parameters, which have no values to compare yet and would draw later.

    Raises:
        UsageError: A parameter is not initialized.
    """
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise factory_error(
            key,
            f"{lazy[0]!r} of the model is not initialized yet (a lazy module). Run a dummy batch through the model in "
            "your function, before creating its optimizer.",
            tensor=lazy[0],
        )


def factory_error(key: str, problem: str, **fields: Any) -> UsageError:
    """Create the error about a factory.

    Args:
        key: `model.factory` or `replica.factory`.
        problem: What is wrong, and how to fix it.
        **fields: Further fields of the error.
    """
    return UsageError(f"{key}: {problem}", code="bad-factory", key=key, **fields)
