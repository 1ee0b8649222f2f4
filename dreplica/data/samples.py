"""Samples, and what is asked of a data set beyond `len` and `[]`: its view of an epoch, the name of a sample."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dreplica.errors import UsageError

Sample = tuple[Tensor, int]
"""An image, uint8 (3, H, W), or an input of any other dtype and shape; a label, from 0."""

Place = tuple[int, int]
"""Which batch of a run: the number of the pass over a data set (counted by the coordinator), and the batch's in it."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel, of pixels scaled to 0…1: what torchvision's pretrained weights were trained with."""


class SampleError(UsageError):
    """A sample that cannot be loaded; the message names it."""


@dataclass(frozen=True)
class DataSets:
    """What there is to train and validate on."""

    train: Dataset[Sample]
    val: Dataset[Sample]
    num_classes: int
    digest: str
    """32 hex digits over the data, or what stands for them: replicas must have loaded the same."""
    weights: Tensor | None = None
    """(training samples,) float32: what each counts in the loss; None: all the same."""
    skipped: tuple[str, ...] = ()
    """What was left out because it cannot be loaded: a line each."""

    def without(self, train: Sequence[int], val: Sequence[int], skipped: Sequence[str]) -> "DataSets":
        """The data without the samples of these indices, which no longer count in the digest of files either."""
        kept = _others(train, len(self.train))  # type: ignore[arg-type]
        kept_train = Kept(self.train, kept)
        kept_val = Kept(self.val, _others(val, len(self.val)))  # type: ignore[arg-type]
        digest = digest_files(kept_train, kept_val) if hasattr(self.train, "signature") else self.digest
        weights = None if self.weights is None else self.weights[kept]
        return replace(self, train=kept_train, val=kept_val, digest=digest, weights=weights, skipped=tuple(skipped))


class TensorImages(Dataset[Sample]):
    """Images in memory: `images` float32 (N, C, H, W), `labels` int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.image_shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.labels[index])


class Kept(Dataset[Sample]):
    """Those samples of a data set whose indices are `kept`; their augmentation is what it is in the whole set."""

    def __init__(self, dataset: Dataset[Sample], kept: Sequence[int]) -> None:
        self.dataset, self.kept = dataset, kept
        self.normalization, self.image_shape = normalization(dataset), image_shape(dataset)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.kept[index]]

    def at_epoch(self, epoch: int) -> "Kept":
        """The view of an epoch."""
        return Kept(at_epoch(self.dataset, epoch), self.kept)

    def by_itself(self) -> "Kept":
        """The same samples, decoded anew each time."""
        return Kept(by_itself(self.dataset), self.kept)

    def without_batched(self) -> "Kept":
        """The same samples without what is done with a whole batch; only of images."""
        return Kept(self.dataset.without_batched(), self.kept)  # type: ignore[attr-defined]

    def load_batch(self, indices: Sequence[int], place: Place | None = None) -> Any:
        """As the whole set would."""
        return load_batch(self.dataset, [self.kept[index] for index in indices], place)

    def augment_batch(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """As the whole set would; only of images."""
        return self.dataset.augment_batch(images, [self.kept[index] for index in indices])  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        """Which sample it is."""
        return describe(self.dataset, self.kept[index])

    def signature(self, index: int) -> str:
        """That of the sample in the whole set."""
        return self.dataset.signature(self.kept[index])  # type: ignore[attr-defined]


def at_epoch(dataset: Dataset[Any], epoch: int) -> Dataset[Any]:
    """`dataset` as it is in an epoch (from 1): its `at_epoch(epoch)`, where it has one; otherwise itself."""
    return dataset.at_epoch(epoch) if hasattr(dataset, "at_epoch") else dataset


def by_itself(dataset: Dataset[Any]) -> Dataset[Any]:
    """`dataset` without what is kept or shared of it: its `by_itself()`, where it has one; otherwise itself."""
    return dataset.by_itself() if hasattr(dataset, "by_itself") else dataset


def describe(dataset: Dataset[Any], index: int) -> str:
    """Which sample it is, in words: its index and, where the data set can tell (`describe(index)`), its file."""
    return f"index {index}" + (f" ({dataset.describe(index)})" if hasattr(dataset, "describe") else "")


def digest_files(*datasets: Any) -> str:
    """32 hex digits over the samples of sets that tell each sample's `signature(index)`, in their order."""
    hashed = xxhash.xxh3_128()
    for dataset in datasets:
        hashed.update(f"{len(dataset)} samples\n".encode())
        for index in range(len(dataset)):
            hashed.update(dataset.signature(index).encode(errors="surrogateescape"))
    return hashed.hexdigest()


def normalization(dataset: Dataset[Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation per channel, of pixels scaled to 0…1, that uint8 images are normalised by."""
    return getattr(dataset, "normalization", (IMAGENET_MEAN, IMAGENET_STD))


def image_shape(dataset: Dataset[Any]) -> tuple[int, ...] | None:
    """(channels, height, width) of all samples, where the data set can tell without loading one; otherwise None."""
    return getattr(dataset, "image_shape", None)


def load_sample(dataset: Dataset[Any], index: int, load: Callable[[int], Any] | None = None) -> Any:
    """`dataset[index]`, or `load(index)`. Raises UsageError, naming the sample, whatever the data set itself raises."""
    try:
        return dataset[index] if load is None else load(index)
    except UsageError:
        raise
    except Exception as error:  # a user's data set may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise SampleError(
            f"data.name: the sample at {describe(dataset, index)} cannot be loaded: "
            f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno}). "
            "Mend it or the data set, or leave such samples out: --data.on_error skip."
        ) from error


def load_batch(dataset: Dataset[Any], indices: Sequence[int], place: Place | None = None) -> Any:
    """Inputs and labels, collated: by `dataset.load_batch`, where it has one; otherwise sample by sample.

    Raises UsageError, naming the sample, for one that cannot be loaded, and what `default_collate` raises.
    """
    if hasattr(dataset, "load_batch"):
        return dataset.load_batch(indices, place)
    return default_collate([load_sample(dataset, index) for index in indices])


def _others(indices: Sequence[int], num_samples: int) -> list[int]:
    kept = torch.ones(num_samples, dtype=torch.bool)
    kept[list(indices)] = False
    return kept.nonzero().flatten().tolist()


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
