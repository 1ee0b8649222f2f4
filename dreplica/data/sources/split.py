"""The split of a data set into training and validation samples."""

import torch
from torch import Tensor

from dreplica.errors import UsageError


def split_indices(num_samples: int, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw which samples are for training and which for validation, from a separate generator.

    Args:
        num_samples: Number of samples of the data set.
        val_fraction: Fraction of the samples for validation, `data.val_fraction`.
        seed: `data.split_seed`.

    Returns:
        Indices of the training samples and of the validation samples, int64.

    Raises:
        UsageError: If either part is empty.
    """
    num_val = round(num_samples * val_fraction)
    if not 0 < num_val < num_samples:
        raise UsageError(
            f"data.val_fraction: {val_fraction} of {num_samples} samples leaves {num_val} for validation "
            f"and {num_samples - num_val} for training. Choose a fraction that leaves at least one sample for each.",
            code="empty-split",
            key="data.val_fraction",
            value=val_fraction,
            num_samples=num_samples,
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return order[num_val:], order[:num_val]
