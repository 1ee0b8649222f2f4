"""Digests that come when they come."""

from functools import cached_property

import torch
from torch import Tensor


class Digests:
    """Digests that a device is computing, 16 bytes each, on their way into memory of the host.

    Args:
        rows: (num_tensors, 2) int64, on the CPU: what is being written to.
        written: recorded behind the copy; None if there is nothing to wait for.
    """

    def __init__(self, rows: Tensor, written: torch.cuda.Event | None) -> None:
        self._rows, self._written = rows, written

    @property
    def ready(self) -> bool:
        """Whether reading them would not wait."""
        return self._written is None or self._written.query()

    @cached_property
    def all(self) -> bytes:
        """The digests one after another. Waits for this computation, and not for what the device was given since."""
        if self._written is not None:
            self._written.synchronize()
        return self._rows.numpy().tobytes()
