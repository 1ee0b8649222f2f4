"""The warning about gradients that are never set to zero.

By default `zero_grad()` drops the gradients, and the next backward pass makes new tensors. Where a gradient stays the
same tensor, hooks on one small parameter of the optimizer watch the backward passes of a few steps: if each of them
adds to what was left, nothing has set it to zero.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.subject import Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.state.stages import parameter_names

_MOST_STEPS = 100
"""Steps after which the gradients are no longer watched."""
_LARGEST = 2**16
"""Elements of the largest gradient of which copies are made."""
_NEEDED, _MOST_MISSES = 2, 3
"""Steps in a row that prove it, and steps after which it is disproved."""


class LeftoverWatch:
    """Watch for gradients that add up over all steps.

    Args:
        subject: The models and optimizers.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._probes: list[_Probe] | None = None
        self._steps = 0

    def step(self, step: int) -> Iterable[Evidence]:
        """Return a warning for each optimizer whose gradients are known to add up.

        Args:
            step: The step, whose gradients are still there.
        """
        self._steps += 1
        if self._steps > _MOST_STEPS:
            if self._probes:
                self.close()
            return ()
        if self._probes is None:
            self._probes = self._choose()
        found = []
        for probe in list(self._probes):
            if probe.step():
                found.append(
                    warning(
                        "gradients-not-zeroed",
                        tensor=probe.name,
                        before=step - 1,
                        step=step,
                        optimizer=probe.optimizer,
                    )
                )
            if probe.is_done:
                self._probes.remove(probe)
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for probe in self._probes or ():
            probe.disarm()
        self._probes = []

    def _choose(self) -> "list[_Probe]":
        """Return a probe of the smallest parameter of each optimizer."""
        probes = []
        for own_name, optimizer in self._subject.optimizers.items():
            names = parameter_names(self._subject.model, optimizer, own_name)
            held = [each for group in optimizer.param_groups for each in group["params"] if _can_watch(each)]
            if held:
                smallest = min(held, key=lambda each: each.numel())
                kind = f"the {own_name} optimizer" if own_name else f"the {type(optimizer).__name__} optimizer"
                probes.append(_Probe(smallest, names[smallest], kind))
        return probes


def _can_watch(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided or not parameter.requires_grad:
        return False
    return type(gradient) is Tensor and 0 < gradient.numel() <= _LARGEST


class _Probe:
    """One parameter whose gradient is watched.

    Args:
        parameter: The parameter.
        name: Its name.
        optimizer: Its optimizer, in words.

    Attributes:
        is_done: True once the question is settled.
    """

    def __init__(self, parameter: Tensor, name: str, optimizer: str) -> None:
        self.name, self.optimizer = name, optimizer
        self.is_done = False
        self._parameter = parameter
        self._gradient: Tensor | None = None
        self._expected: Tensor | None = None
        self._flags: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._proved = self._missed = 0

    def step(self) -> bool:
        """Return True once all backward passes of two steps in a row have added to what was left."""
        gradient = self._parameter.grad
        if self._handles:
            kept = bool(self._flags) and bool(torch.stack(self._flags).all())  # the only wait for a device
            self._proved = self._proved + 1 if kept else 0
            self._missed += not kept
            self.disarm()
        if self._proved >= _NEEDED or self._missed >= _MOST_MISSES:
            self.is_done = True
        elif gradient is not None and gradient is self._gradient:
            self._arm(gradient)
        self._gradient = gradient
        return self._proved >= _NEEDED

    def _arm(self, gradient: Tensor) -> None:
        self._expected, self._flags = gradient.detach().clone(), []
        self._handles = [
            self._parameter.register_hook(self._before_backward),
            self._parameter.register_post_accumulate_grad_hook(self._after_backward),
        ]

    def disarm(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._expected, self._flags = [], None, []

    def _before_backward(self, _: Tensor) -> None:
        """Note whether what was left is still there, and not 0."""
        left, expected = self._parameter.grad, self._expected
        if left is None or expected is None or left.shape != expected.shape:
            self._flags.append(torch.zeros((), dtype=torch.bool, device=self._parameter.device))
        else:
            left = left.detach()
            self._flags.append((left == expected).all() & left.any())

    def _after_backward(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        self._expected = None if gradient is None else gradient.detach().clone()
