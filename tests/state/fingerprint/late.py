"""A fake device that computes digests only when a caller waits for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreplica.agreement.hasher import Hasher
from dreplica.state.fingerprint.fingerprint import digest_tensor
from dreplica.state.fingerprint.pending_digests import Digests


class LateHasher(Hasher):
    """A hasher whose digests of tensors with dimensions are computed late.

    Tensors without dimensions are hashed on the CPU at once, as a model's step counts are.

    Attributes:
        waited: Indices of the computations that a caller has waited for, in that order.
        num_started: Number of computations started.
    """

    def __init__(self) -> None:
        super().__init__(lambda tensor: tensor.dim() > 0)
        self.waited: list[int] = []
        self.num_started = 0

    def _device_hash(self, device: torch.device) -> Any:
        return _LateDevice(self)


class _LateDevice:
    """A fake `DeviceHash`, whose digests are those of the CPU with the bytes reversed."""

    def __init__(self, hasher: LateHasher) -> None:
        self._hasher = hasher

    def start(self, named: Sequence[tuple[str, Tensor]]) -> Digests:
        number, self._hasher.num_started = self._hasher.num_started, self._hasher.num_started + 1
        digests = b"".join(digest_tensor(name, tensor)[::-1] for name, tensor in named)
        rows = torch.zeros(len(named), 2, dtype=torch.int64)
        return Digests(rows, _Written(self._hasher, number, rows, digests))  # type: ignore[arg-type]


class _Written:
    """A fake event, recorded after the copy to the host."""

    def __init__(self, hasher: LateHasher, number: int, rows: Tensor, digests: bytes) -> None:
        self._hasher, self._number, self._rows, self._digests = hasher, number, rows, digests

    def query(self) -> bool:
        return self._number in self._hasher.waited

    def synchronize(self) -> None:
        self._hasher.waited.append(self._number)
        self._rows.copy_(torch.frombuffer(bytearray(self._digests), dtype=torch.int64).view(-1, 2))
