"""The split into training and validation samples."""

import torch
from torch import Tensor

from dreplica.errors import UsageError


def split_indices(num_samples: int, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and validation indices, int64, drawn from a generator of their own.

    Raises UsageError if either comes out empty.
    """
    num_val = round(num_samples * val_fraction)
    if not 0 < num_val < num_samples:
        raise UsageError(
            f"data.val_fraction: {val_fraction} of {num_samples} samples leaves {num_val} for validation "
            f"and {num_samples - num_val} for training. Choose a fraction that leaves some for both."
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return order[num_val:], order[:num_val]
