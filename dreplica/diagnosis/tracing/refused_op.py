"""Which operator it was that strict mode does not let run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dreplica.diagnosis.tracing.op_signature import signature_of
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.state.stages import Optimizers

_REFUSALS = ("does not have a deterministic implementation", "Deterministic behavior was enabled with either")
"""How torch's errors about it begin, or go on: of an operator of its own, and of cuBLAS without its workspace."""


@dataclass(frozen=True)
class Raised:
    """An operator that raised."""

    operator: str
    """As in `aten.max_unpool2d.default`."""
    module: str
    """Path of the innermost module that it belongs to; empty outside of modules."""
    phase: str
    """`forward`, `backward` or `optimizer`."""


def is_refusal(error: BaseException) -> bool:
    """Whether it is torch's error about an operator that is not deterministic."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSALS)


def find_refused(step: Callable[[], Any], optimizer: Optimizers, model: nn.Module) -> Raised | None:
    """Takes a step again, whose operator raises again; None if it does not."""
    tracer = _Tracer(optimizer, model=model)
    try:
        with tracer:
            step()
    except RuntimeError as error:
        if not is_refusal(error):
            raise
    return tracer.raised


class _Tracer(OpTracer):
    """Notes the operator that raises, the innermost of those that call each other."""

    raised: Raised | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except RuntimeError as error:
            if self.raised is None and is_refusal(error):
                self.raised = Raised(signature_of(func).name, self._modules.current(), self._phase())
            raise
