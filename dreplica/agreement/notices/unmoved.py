"""Warnings about parameters with gradients, and moving averages, that do not change."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dreplica.agreement.notices.rates import has_rate
from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.subject import Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.wiring.optimizer import held_parameters
from dreplica.state.fingerprint.stage import Stage
from dreplica.state.stages import named_weights, plain_name

_UNHELD_STEPS = 20
"""Compared steps after which a parameter that no optimizer moves is reported. A loss scaler skips fewer at first."""
_HELD_STEPS = 100
"""The same for a parameter whose optimizer has a learning rate: it may be trained later, or in very small updates."""
_NEGLIGIBLE = 1e-3
"""Fraction of the optimizer's largest gradient below which one may be rounding only: that of a bias before a norm."""
_AVERAGE_STEPS = 100
"""The same for a moving average. Some begin after a number of steps."""

_IS_AVERAGE = re.compile(r"(^|[^a-zA-Z])ema($|[^a-z])|EMA|Ema(?![a-z])|MovingAverage|AveragedModel")
_COUNTS = frozenset({"n_averaged", "num_updates", "updates", "step", "steps", "decay", "initted"})
"""Entries of a moving average that may change although its values do not."""


class ParameterWatch:
    """Watch for parameters that have a gradient and never change.

    The digests show which parameters did not change since the first comparison. Their gradients are read only for
    those, in the step after: when their optimizer steps, since another loss may add to them later. A parameter that
    then still has not changed is reported.

    Args:
        subject: The models and optimizers.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._first: Mapping[str, bytes] = {}
        self._steps = 0
        self._candidates: list[str] = []
        self._with_gradient: set[str] = set()
        self._reported: set[str] = set()
        self._at_step: dict[int, set[int]] = {}
        self._hooks: list[Any] = []

    def step(self) -> None:
        """Read the gradients of the parameters that did not change, if there are any."""
        if not self._candidates:
            return
        self.close()
        named = named_weights(self._subject.model)
        for name in self._candidates:
            parameter = named.get(name)
            optimizer = None if parameter is None else self._optimizer_of(parameter)
            if parameter is None or not _has_gradient(parameter):
                continue
            if optimizer is None or not has_rate(_group_of(optimizer, parameter)):
                self._with_gradient.add(name)
            elif id(_inner(optimizer)) in self._at_step:
                if id(parameter) in self._at_step[id(_inner(optimizer))]:
                    self._with_gradient.add(name)
            elif {id(each) for each in held_parameters(optimizer)} <= {id(named[each]) for each in self._candidates}:
                self._with_gradient.add(name)  # the optimizer did not step, and none of its parameters ever changed
        self._candidates, self._at_step = [], {}

    def compared(self, weights: Stage) -> Iterable[Evidence]:
        """Count a comparison in which all replicas agreed, and return warnings.

        Args:
            weights: The digests of this step.
        """
        if not self._first:
            self._first = weights.entries()
            return ()
        self._steps += 1
        found: Iterable[Evidence] = ()
        if self._with_gradient:
            found, self._with_gradient = [*self._report(self._unchanged(weights) & self._with_gradient)], set()
        if self._steps in (_UNHELD_STEPS, _HELD_STEPS):
            unchanged = self._unchanged(weights)
            self._candidates = [name for name in weights.names if name in unchanged - self._reported]
            if self._candidates and self._steps == _HELD_STEPS:
                self._look_at_next_step()
        return found

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look_at_next_step(self) -> None:
        for optimizer in self._subject.optimizers.values():
            inner = _inner(optimizer)
            if hasattr(inner, "_optimizer_step_pre_hooks"):  # otherwise not an optimizer of torch
                self._hooks.append(inner.register_step_pre_hook(self._before_step))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Note which parameters of an optimizer have a gradient that is not negligible among all of its gradients."""
        held = [each for each in held_parameters(optimizer) if _has_gradient(each)]
        sizes = [float(each.grad.abs().max()) for each in held if each.grad is not None and not each.grad.is_sparse]
        largest = max(sizes, default=0.0)
        kept = self._at_step.setdefault(id(optimizer), set())
        dense = [each for each in held if each.grad is not None and not each.grad.is_sparse]
        kept.update(id(each) for each, size in zip(dense, sizes, strict=True) if size >= _NEGLIGIBLE * largest)

    def _optimizer_of(self, parameter: Tensor) -> torch.optim.Optimizer | None:
        for optimizer in self._subject.optimizers.values():
            if any(each is parameter for each in held_parameters(optimizer)):
                return optimizer
        return None

    def _unchanged(self, weights: Stage) -> set[str]:
        return {name for name, digest in weights.entries().items() if self._first.get(name) == digest}

    def _report(self, unchanged: Collection[str]) -> Iterator[Evidence]:
        """Yield a warning for each reason for which parameters with a gradient do not change."""
        reasons: dict[str, list[str]] = {}
        named = named_weights(self._subject.model)
        all_groups = [group for each in self._subject.optimizers.values() for group in each.param_groups]
        if not any(map(has_rate, all_groups)):
            return  # RateWatch looks for that
        for name in [name for name in named if name in unchanged]:
            optimizer = self._optimizer_of(named[name])
            if optimizer is None:
                code = "parameter-not-optimized"
            elif not has_rate(_group_of(optimizer, named[name])):
                code = "parameter-rate-zero"
            else:
                code = "parameter-unmoved"
            if code != "parameter-unmoved" or self._steps >= _HELD_STEPS:
                reasons.setdefault(code, []).append(name)
        for code, names in reasons.items():
            self._reported.update(names)
            dtype = str(named[names[0]].dtype).removeprefix("torch.")
            yield warning(code, tensors=list_names(names), names=names, tensor=names[0], steps=self._steps, dtype=dtype)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside a wrapper, such as accelerate's, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    groups = optimizer.param_groups
    return next(group for group in groups if any(each is parameter for each in group["params"]))


def _has_gradient(parameter: Tensor) -> bool:
    """Return True if a parameter has a gradient that is finite and not 0. Waits for the device."""
    if parameter.grad is None or not parameter.requires_grad:
        return False
    gradient = parameter.grad.detach()
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(gradient.isfinite().all()) and bool(gradient.any())


class AverageWatch:
    """Watch for moving averages of the weights that do not change while the weights do.

    They are found among the models and their modules, and in `others`: `torch.optim.swa_utils.AveragedModel`, and what
    has `ema` or `MovingAverage` in its name.

    Args:
        subject: The models and optimizers.
    """

    def __init__(self, subject: Subject) -> None:
        self._averages = [*_averages_in_models(subject), *_averages_in_others(subject.others)]
        self._inside = tuple(prefix for stage, prefix, _, _ in self._averages if stage == "weights")
        self._first: dict[str, Mapping[str, bytes]] = {}
        self._newest: Mapping[str, Stage] = {}
        self._steps = 0

    def compared(self, stages: Mapping[str, Stage]) -> Iterable[Evidence]:
        """Count a comparison in which all replicas agreed, and return warnings.

        Args:
            stages: The digests of this step, `weights` among them.
        """
        if not self._averages:
            return ()
        for name in ("weights", "optimizer"):
            if name in stages and name not in self._first:
                self._first[name] = stages[name].entries()
        self._newest = stages
        self._steps += 1
        return self._report(late=False) if self._steps == _AVERAGE_STEPS + 1 else ()

    def finish(self) -> Iterable[Evidence]:
        """Return warnings of averages that did not change in the whole run."""
        return self._report(late=True) if self._steps > _UNHELD_STEPS else ()

    def _report(self, late: bool) -> Iterable[Evidence]:
        """Yield a warning for each average that has not changed, those of the late part of training only if `late`."""
        if not self._weights_changed():
            return
        for each in list(self._averages):
            stage, prefix, name, is_late = each
            if (is_late and not late) or stage not in self._newest or stage not in self._first:
                continue
            first, newest = self._first[stage], self._newest[stage].entries()
            values = [key for key in newest if key.startswith(prefix) and key.rpartition(".")[2] not in _COUNTS]
            if values and all(first.get(key) == newest[key] for key in values):
                self._averages.remove(each)
                names = [key.removeprefix(prefix) for key in values]
                listed, steps = list_names(names), self._steps - 1
                yield warning("average-unmoved", name=name, tensors=listed, names=names, steps=steps)

    def _weights_changed(self) -> bool:
        first, newest = self._first["weights"], self._newest["weights"].entries()
        outside = [name for name in newest if not (self._inside and name.startswith(self._inside))]
        return any(first.get(name) != newest[name] for name in outside)


def _averages_in_models(subject: Subject) -> Iterator[tuple[str, str, str, bool]]:
    """Yield stage, prefix of the entries, name, and True for an average that begins late in training."""
    found: list[str] = []
    held = {id(each) for optimizer in subject.optimizers.values() for each in held_parameters(optimizer)}
    for path, module in subject.model.named_modules():
        name = plain_name(path)
        last = name.rpartition(".")[2]
        if not name or any(name.startswith(outer) for outer in found):
            continue
        is_average = isinstance(module, AveragedModel) or _IS_AVERAGE.search(type(module).__name__)
        if (is_average or _IS_AVERAGE.search(last)) and not any(id(each) in held for each in module.parameters()):
            found.append(f"{name}.")
            yield "weights", f"{name}.", name, _begins_late(module)


def _averages_in_others(others: Iterable[Any]) -> Iterator[tuple[str, str, str, bool]]:
    for other in others:
        name = type(other).__name__
        if _IS_AVERAGE.search(name):
            yield "optimizer", f"{name}.", name, _begins_late(other)


def _begins_late(average: Any) -> bool:
    """Return True for stochastic weight averaging, which usually begins in the last quarter of training."""
    if not isinstance(average, AveragedModel):
        return False
    return getattr(average, "avg_fn", None) is None and getattr(average, "multi_avg_fn", None) is None
