"""Warnings about NaN and infinity in the state after the build, and in losses."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.state.fingerprint.fingerprint import WITH_MEMORY
from dreplica.state.stages import named_buffers, named_weights, plain_name

_NEVER_WRITTEN = (
    "Initialize it: the memory of torch.empty has any values, and NaN with torch.use_deterministic_algorithms(True)"
)
_DIVERGED = "Look for the first step whose loss or gradient is not finite"

_WINDOW = 32
"""Losses on a device that are checked together, without waiting for the device."""


def warn_of_values(model: nn.Module, step: int) -> Iterator[Evidence]:
    """Yield a warning of parameters and of buffers with values that are not finite.

    Infinity is usual in buffers (masks, running minima), so only NaN counts there, except in the statistics of a norm.

    Args:
        model: The model.
        step: The number of steps taken, 0 after the build.
    """
    statistics = {
        plain_name(f"{path}.{name}" if path else name)
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    for kind, named in (("parameter", named_weights(model)), ("buffer", named_buffers(model))):
        rows = []
        for name, tensor in _suspicious(named):
            num_nan, num_infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            if num_nan or (num_infinite and (kind == "parameter" or name in statistics)):
                rows.append((name, num_nan, num_infinite, tensor.numel()))
        if rows:
            name, num_nan, num_infinite, num_elements = rows[0]
            yield warning(
                "not-finite",
                kind=kind,
                tensor=name,
                num_nan=num_nan,
                num_infinite=num_infinite,
                num_elements=num_elements,
                when=f"after step {step}" if step else "after the build",
                step=step,
                more=f", and so have {len(rows) - 1} more" if len(rows) > 1 else "",
                tensors=[row[0] for row in rows],
                fix=_DIVERGED if step else _NEVER_WRITTEN,
            )


def _suspicious(named: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return the tensors whose sum is not finite, which is so if a value is not finite, or if the sum overflows."""
    rows = [(name, _as_summable(tensor.detach())) for name, tensor in named.items() if _has_floats(tensor)]
    sums: dict[torch.device, list[Tensor]] = {}
    for _, tensor in rows:
        dtype = torch.float32 if tensor.dtype.itemsize < 4 else None
        sums.setdefault(tensor.device, []).append(tensor.sum(dtype=dtype).isfinite())
    finite = {device: iter(torch.stack(flags).tolist()) for device, flags in sums.items()}
    return [(name, tensor) for name, tensor in rows if not next(finite[tensor.device])]


def _as_summable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no sum


def _has_floats(tensor: Tensor) -> bool:
    if type(tensor) not in WITH_MEMORY or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.is_floating_point() or tensor.is_complex()


class LossWatch:
    """Watch for the first loss that is NaN or infinite.

    A loss on the CPU is read at once. Losses on a device are copied there into a buffer, whose content arrives later.
    """

    def __init__(self) -> None:
        self._done = False
        self._buffer: Tensor | None = None
        self._cells: tuple[Tensor, ...] = ()
        self._steps: list[int] = []
        self._arriving: tuple[list[int], Tensor, torch.cuda.Event | None] | None = None

    def step(self, step: int, loss: Tensor) -> Iterable[Evidence]:
        """Return a warning if the loss of this step, or one that has arrived, is the first that is not finite.

        Args:
            step: The step.
            loss: Its loss. Ignored unless it is a single number.
        """
        if self._done or type(loss) not in WITH_MEMORY or loss.numel() != 1 or not loss.is_floating_point():
            return ()
        if loss.is_cpu:
            value = loss.item()
            return () if math.isfinite(value) else self._warn(step, value)
        self._copy(step, loss.detach())
        return self._arrived(wait=False)

    def finish(self) -> Iterable[Evidence]:
        """Return a warning if a loss that was not checked yet is not finite. Waits for the device."""
        if self._done:
            return ()
        found = [*self._arrived(wait=True)]
        if not found and self._steps and self._buffer is not None:
            found = [*self._first(self._steps, self._buffer.tolist())]
        return found

    def _copy(self, step: int, loss: Tensor) -> None:
        if self._buffer is None or (self._buffer.device, self._buffer.dtype) != (loss.device, loss.dtype):
            self._buffer = torch.zeros(_WINDOW, dtype=loss.dtype, device=loss.device)
            self._cells, self._steps = self._buffer.unbind(), []
        self._cells[len(self._steps)].copy_(loss.reshape(()))
        self._steps.append(step)
        if len(self._steps) == _WINDOW:
            self._send(self._buffer)

    def _send(self, buffer: Tensor) -> None:
        """Start to copy the buffer to the host."""
        event = None
        if buffer.is_cuda:
            host = torch.empty(_WINDOW, dtype=buffer.dtype, device="cpu", pin_memory=True)
            host.copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(buffer.device))
        else:
            host = buffer.cpu()
        self._arriving, self._steps = (self._steps, host, event), []

    def _arrived(self, wait: bool) -> Iterable[Evidence]:
        if self._arriving is None:
            return ()
        steps, host, event = self._arriving
        if event is not None:
            if not wait and not event.query():
                return ()
            event.synchronize()
        self._arriving = None
        return self._first(steps, host.tolist())

    def _first(self, steps: list[int], values: list[float]) -> Iterable[Evidence]:
        for step, value in zip(steps, values, strict=False):
            if not math.isfinite(value):
                return self._warn(step, value)
        return ()

    def _warn(self, step: int, value: float) -> Iterable[Evidence]:
        self._done, self._buffer, self._cells = True, None, ()
        return [warning("loss-not-finite", step=step, value="NaN" if math.isnan(value) else str(value))]
