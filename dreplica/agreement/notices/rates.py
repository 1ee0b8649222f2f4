"""The warning about a learning rate that stays 0."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.verdict.evidence import Evidence

_STEPS = 20
"""Steps in a row at 0 after which a schedule has ended: a cosine or cyclic schedule touches 0 for a step."""
_STEPS_BY_HAND = 100
"""The same at the start of a run whose rates no scheduler of torch sets: they may be warmed up by hand."""


class RateWatch:
    """Watch for a learning rate of 0 in all parameter groups.

    At the start of a run, a rate of 0 may be a warm-up that a scheduler steps per epoch: then it is warned of only if
    the rate is 0 when the run finishes.

    Args:
        optimizers: Name to optimizer.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers.values())
        self._since: int | None = None
        self._steps = 0
        self._was_positive = self._done = False

    def step(self, step: int) -> Iterable[Evidence]:
        """Return a warning if the rate has been 0 for too many steps now."""
        if self._done or not self._optimizers:
            return ()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if has_rate(group):
                    self._was_positive, self._since, self._steps = True, None, 0
                    return ()
        self._since = step if self._since is None else self._since
        self._steps += 1
        most = _STEPS if self._was_positive else self._most_at_start()
        return self._warn() if most is not None and self._steps >= most else ()

    def finish(self) -> Iterable[Evidence]:
        """Return a warning if the rate has been 0 during the whole run."""
        return self._warn() if not self._done and self._steps >= _STEPS else ()

    def _most_at_start(self) -> int | None:
        """Return the number of steps at 0 that a run may begin with, or None if a scheduler may raise the rate."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        initial = [group["initial_lr"] for group in groups if "initial_lr" in group]  # a scheduler of torch sets it
        if not initial:
            return _STEPS_BY_HAND
        return None if any(float(rate) for rate in initial) else _STEPS

    def _warn(self) -> Iterable[Evidence]:
        self._done = True
        return [warning("learning-rate-zero", steps=self._steps, since=self._since)]


def has_rate(group: Mapping[str, Any]) -> bool:
    """Return True unless a parameter group's learning rate is known to be 0, without waiting for a device."""
    rate = group.get("lr")
    if rate is None or (isinstance(rate, Tensor) and not rate.is_cpu):
        return True
    return bool(rate != 0)
