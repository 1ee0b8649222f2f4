"""`check_wiring`: check by identity that model, criterion, optimizer and scheduler belong together."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dreplica.agreement.wiring.fault import WiringError
from dreplica.agreement.wiring.optimizer import optimizer_faults
from dreplica.agreement.wiring.schedulers import scheduler_faults
from dreplica.agreement.wiring.storage import storage_faults
from dreplica.errors import UsageError


def check_wiring(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any = None,
    criterion: nn.Module | None = None,
) -> None:
    """Check by identity that model, optimizer and scheduler belong together.

    Call it once model, optimizer and scheduler are final. It needs no step and no process group, and changes nothing.
    A model may be wrapped (DistributedDataParallel, `torch.compile`) or sharded (`fully_shard`, tensor parallelism).
    The cause is in the error's `code`:

    - `optimizer-not-bound`: the optimizer holds parameters that belong to neither the model nor the criterion.
    - `parameters-not-optimized`: a trainable parameter is in no parameter group, or in the groups twice.
    - `scheduler-not-bound`: the scheduler, or one in its attributes, drives another optimizer.
    - `storage-shared`: two different parameters or buffers overlap in memory. Tied weights, which are one parameter
      under two names, are fine.

    Args:
        model: The model to train.
        optimizer: The optimizer that trains it. None checks only the model's memory.
        scheduler: The learning rate scheduler, None if there is none.
        criterion: The loss module, if the optimizer may train its parameters, too.

    Raises:
        WiringError: If they do not belong together.
        UsageError: If `model` is not an `nn.Module`, or `optimizer` has no `param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise _wrong_type("model", "an nn.Module", model)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise _wrong_type("optimizer", "a torch.optim.Optimizer or None", optimizer)
    for fault in _faults(model, optimizer, scheduler, criterion):
        raise fault


def _faults(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: Any, criterion: nn.Module | None
) -> Iterator[WiringError]:
    if optimizer is not None:
        yield from optimizer_faults(model, optimizer, criterion)
        if scheduler is not None:
            yield from scheduler_faults([optimizer], scheduler)
    yield from storage_faults(model)


def _wrong_type(name: str, expected: str, value: object) -> UsageError:
    found = type(value).__name__
    text = f"{name} must be {expected}, got {found}. Check each model with its own optimizer, in one call per model."
    return UsageError(text, code="wrong-type", argument=name, expected=expected, found=found)
