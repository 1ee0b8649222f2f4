"""Search for the operator that raises in strict mode, because it has no deterministic implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dreplica.diagnosis.tracing.op_signature import signature_of
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.state.stages import Optimizers

_REFUSALS = ("does not have a deterministic implementation", "Deterministic behavior was enabled with either")
"""Texts in torch's errors: about an operator of torch, and about cuBLAS without workspace config."""


@dataclass(frozen=True)
class Raised:
    """An operator that raised."""

    operator: str
    """Name with namespace and overload, such as `aten.max_unpool2d.default`."""
    module: str
    """Path of the innermost module that the operator belongs to. Empty outside of modules."""
    phase: str
    """Phase of the step: `forward`, `backward` or `optimizer`."""


def is_refusal(error: BaseException) -> bool:
    """Return True for torch's error about an operator without deterministic implementation."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSALS)


def find_refused(step: Callable[[], Any], optimizer: Optimizers, model: nn.Module) -> Raised | None:
    """Repeat a step in which an operator raised, and return the operator.

    Args:
        step: Runs the step.
        optimizer: One optimizer, or several by name.
        model: The model.

    Returns:
        The operator, or None if the step does not raise again.
    """
    tracer = _Tracer(optimizer, model=model)
    try:
        with tracer:
            step()
    except RuntimeError as error:
        if not is_refusal(error):
            raise
    return tracer.raised


class _Tracer(OpTracer):
    """Tracer that keeps the operator that raises, the innermost if operators call each other."""

    raised: Raised | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except RuntimeError as error:
            if self.raised is None and is_refusal(error):
                self.raised = Raised(signature_of(func).name, self._modules.current(), self._phase())
            raise
