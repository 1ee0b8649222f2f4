"""Where a run stands."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """What a training loop needs to know to go on, besides the replica's state. The default is the beginning."""

    epoch: int = 1
    """The epoch to go on in, from 1."""
    num_batches: int = 0
    """Its batches that have been trained on."""
    correct: int = 0
    """Of the samples in them, those predicted right,"""
    loss_sum: float = 0.0
    """the sum of their losses,"""
    count: int = 0
    """and how many there were."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `Position(**...)` makes it again."""
        return asdict(self)
