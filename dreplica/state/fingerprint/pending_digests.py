"""Digests being computed asynchronously on a device."""

from functools import cached_property

import torch
from torch import Tensor


class Digests:
    """Digests that a device is computing and copying to host memory, 16 bytes each.

    Args:
        rows: The host buffer that is written to, (num_tensors, 2) int64 on the CPU.
        written: The event recorded after the copy, or None if there is nothing to wait for.
    """

    def __init__(self, rows: Tensor, written: torch.cuda.Event | None) -> None:
        self._rows, self._written = rows, written

    @property
    def ready(self) -> bool:
        """True if reading the digests would not wait."""
        return self._written is None or self._written.query()

    @cached_property
    def all(self) -> bytes:
        """All digests concatenated. Waits for this computation, but not for work that the device was given later."""
        if self._written is not None:
            self._written.synchronize()
        return self._rows.numpy().tobytes()
