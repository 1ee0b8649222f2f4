"""Data sets by name: what there is to train and validate on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy
import torch
import xxhash
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from dreplica.errors import UsageError
from dreplica.section import Lockstep, Section, import_function, nearest

Sample = tuple[Tensor, int]

_DIGITS_SIZE = 32
_DIGITS_MEAN, _DIGITS_STD = 0.3053, 0.3761
"""Of the pixels, scaled to 0…1; written down because a mean computed here would round by the number of threads."""


class DataConfig(Section):
    """What is trained on."""

    name: Annotated[str, Lockstep()] = "digits"
    """`digits` (scikit-learn's bundled 1,797 images, no download), or `package.module:function`, called with this
    section, which returns (training set, validation set, number of classes)."""
    batch_size: Annotated[int, Lockstep()] = Field(64, ge=1)
    """Samples per step, on each replica."""
    num_workers: int = Field(0, ge=0, le=100)
    """Loader processes per replica; 0: load in the training process."""
    val_fraction: Annotated[float, Lockstep()] = Field(0.2, gt=0, lt=1)
    """Part of the samples held out for validation."""
    split_seed: Annotated[int, Lockstep()] = Field(0, ge=0, le=2**32 - 1)
    """Seed of the split into training and validation samples."""


@dataclass(frozen=True)
class DataSets:
    """Samples are (input, label): a float tensor (C, H, W) or of any shape, and an int."""

    train: Dataset[Sample]
    val: Dataset[Sample]
    num_classes: int
    digest: str
    """32 hex digits over the data: replicas must have loaded the same."""


class TensorImages(Dataset[Sample]):
    """Images in memory: `images` float32 (N, C, H, W), `labels` int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.labels[index])


def load_data(config: DataConfig) -> DataSets:
    """The data sets that `data.name` names. Raises UsageError if there is no such."""
    if config.name == "digits":
        return _digits(config)
    if ":" in config.name:
        return _from_function(config)
    raise UsageError(
        f"data.name: there is no data set {config.name!r}. {nearest(config.name, ['digits'])} "
        "Or name a function of yours: package.module:function."
    )


def _digits(config: DataConfig) -> DataSets:
    """scikit-learn's digits: 8x8 grey images, scaled to 32x32, three equal channels. Mean 0; deviation 1 before the
    scaling, which smooths."""
    from sklearn.datasets import load_digits  # imported when used: it takes a second

    bunch: Any = load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    images = interpolate(small, size=(_DIGITS_SIZE, _DIGITS_SIZE), mode="bilinear", align_corners=False)
    images = ((images - _DIGITS_MEAN) / _DIGITS_STD).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(numpy.asarray(bunch.target, dtype=numpy.int64))
    train, val = split_indices(len(labels), config.val_fraction, config.split_seed)
    digest = xxhash.xxh3_128(images.numpy().data)
    digest.update(labels.numpy().data)
    return DataSets(
        TensorImages(images[train], labels[train]), TensorImages(images[val], labels[val]), 10, digest.hexdigest()
    )


def _from_function(config: DataConfig) -> DataSets:
    result = import_function("data.name", config.name)(config)
    if not isinstance(result, Sequence) or len(result) != 3:
        raise UsageError(
            f"data.name: {config.name!r} returned {type(result).__name__}. "
            "Return (training set, validation set, number of classes)."
        )
    train, val, num_classes = result
    for key, part in (("training", train), ("validation", val)):
        if len(part) == 0:
            raise UsageError(f"data.name: the {key} set of {config.name!r} is empty.")
    described = f"{config.name} {len(train)} {len(val)} {num_classes}"
    return DataSets(train, val, num_classes, xxhash.xxh3_128_hexdigest(described.encode()))


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
