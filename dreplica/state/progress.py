"""The position of a run in its training data."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """The position from which a training loop resumes, by default the beginning of the run."""

    epoch: int = 1
    """The current epoch, from 1."""
    num_batches: int = 0
    """Number of batches of the epoch that were trained on."""
    correct: int = 0
    """Number of correctly predicted samples in these batches."""
    loss_sum: float = 0.0
    """Sum of the losses of the samples in these batches."""
    count: int = 0
    """Number of samples in these batches."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, the arguments of `Position`."""
        return asdict(self)
