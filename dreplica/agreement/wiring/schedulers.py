"""Checks that schedulers, and those inside them, drive the optimizer that steps."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.wiring.fault import WiringError

_CONTAINERS = (list, tuple, dict)


def scheduler_faults(optimizers: Iterable[torch.optim.Optimizer], scheduler: Any) -> Iterator[WiringError]:
    """Yield a fault for each scheduler that drives another optimizer, from the outermost one.

    Args:
        optimizers: The optimizers that step.
        scheduler: A learning rate scheduler. Schedulers in its attributes are checked, too.
    """
    optimizers = list(optimizers)
    for path, part in _flatten(scheduler):
        driven = getattr(part, "optimizer", None)
        if not hasattr(driven, "param_groups") or any(_is_same(driven, each) for each in optimizers):
            continue
        kind = type(part).__name__
        inner = f" in {type(scheduler).__name__}.{path}" if path else ""
        copied = "copy.deepcopy(scheduler)" if not path else "A state_dict that contains a whole scheduler"
        yield WiringError(
            f"the {kind} scheduler{inner} drives another optimizer, so the learning rate of this optimizer never "
            f"changes. ({copied} also copies the optimizer that the scheduler holds.)",
            code="scheduler-not-bound",
            remedies=[Remedy.of("create-scheduler", scheduler=kind)],
            scheduler=kind,
            path=path,
        )


def is_scheduler(value: Any) -> bool:
    """Return True if an object steps a schedule of an optimizer's settings."""
    if hasattr(value, "param_groups"):  # a wrapper of an optimizer
        return False
    return callable(getattr(value, "step", None)) and hasattr(getattr(value, "optimizer", None), "param_groups")


def _is_same(one: Any, other: Any) -> bool:
    """Return True if two optimizers are one, or if one wraps the other: then they share their parameter groups."""
    if one is other or one.param_groups is other.param_groups:
        return True
    groups = {id(group) for group in other.param_groups}
    return any(id(group) in groups for group in one.param_groups)


def _flatten(scheduler: Any) -> Iterator[tuple[str, Any]]:
    """Yield a scheduler and all schedulers in its attributes, with the path of each."""
    seen: set[int] = set()
    pending = [("", scheduler)]
    while pending:
        path, value = pending.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending += [(f"{path}[{key!r}]", item) for key, item in value.items() if _may_contain(item)]
        elif isinstance(value, list | tuple):
            pending += [(f"{path}[{index}]", item) for index, item in enumerate(value) if _may_contain(item)]
        else:
            yield path, value
            for name, item in getattr(value, "__dict__", {}).items():
                if name != "optimizer" and _may_contain(item):
                    pending.append((f"{path}.{name}" if path else name, item))


def _may_contain(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or is_scheduler(value)
