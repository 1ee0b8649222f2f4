"""Samples, and the optional methods and attributes by which a data set says more about them.

A data set needs `len(dataset)` and `dataset[index]`, which returns (input, label). It may also have:

- `at_epoch(epoch)`: the data set as seen in that epoch (from 1), if its augmentation depends on the epoch.
- `describe(index)`: a name for the sample in messages, such as its file.
- `load_batch(indices, batch_id)`: collated inputs and labels of several samples.
- `uncached()`: the data set without caches, for replays.
- `labels` or `targets`: the labels of all samples, for `data.sample_weights: balanced`.
- `image_shape`: (channels, height, width) of all inputs.
- `normalization`: mean and standard deviation per channel, by which uint8 inputs are normalized.
- `signature(index)`: a line that identifies the sample's data without loading it, for the digest.

The functions here call these where a data set has them, with a default where it does not.
"""

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
"""An input and a label from 0. An image is uint8 (3, H, W); other inputs have any dtype and shape."""

BatchId = tuple[int, int]
"""Identifies a batch of a run: the number of the pass over a data set (from 1), and the batch's index in that pass."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel of pixels scaled to 0…1, as used for torchvision's pretrained weights."""


class SampleError(UsageError):
    """A sample that cannot be loaded or trained on. The message names the sample."""

    default_code = "bad-sample"


@dataclass(frozen=True)
class DataSets:
    """The training and validation sets of a run."""

    train: Dataset[Sample]
    """The training set."""
    val: Dataset[Sample]
    """The validation set."""
    num_classes: int
    """Number of classes. Labels are 0 to num_classes - 1."""
    digest: str
    """32 hex digits over the data, or over what identifies them. All replicas must have the same."""
    weights: Tensor | None = None
    """Weight of each training sample in the loss: float32 (training samples,). None weighs all samples equally."""
    skipped: tuple[str, ...] = ()
    """One line for each sample that was skipped because it cannot be loaded."""

    def without(self, train: Sequence[int], val: Sequence[int], skipped: Sequence[str]) -> "DataSets":
        """Return the data without some samples, which no longer count in a digest over files either.

        Args:
            train: Indices of the training samples to leave out.
            val: Indices of the validation samples to leave out.
            skipped: One line for each sample left out.
        """
        kept = _complement(train, len(self.train))  # type: ignore[arg-type]
        kept_train = SampleSubset(self.train, kept)
        kept_val = SampleSubset(self.val, _complement(val, len(self.val)))  # type: ignore[arg-type]
        digest = digest_files(kept_train, kept_val) if hasattr(self.train, "signature") else self.digest
        weights = None if self.weights is None else self.weights[kept]
        return replace(self, train=kept_train, val=kept_val, digest=digest, weights=weights, skipped=tuple(skipped))


class TensorImages(Dataset[Sample]):
    """A data set of images in memory.

    Args:
        images: float32 or uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.image_shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], int(self.labels[index])


class SampleSubset(Dataset[Sample]):
    """Some samples of a data set, augmented like the same samples of the whole set.

    Args:
        dataset: The whole set.
        kept: Indices into the whole set, one for each sample of this one.
    """

    def __init__(self, dataset: Dataset[Sample], kept: Sequence[int]) -> None:
        self.dataset, self.kept = dataset, kept
        self.normalization, self.image_shape = normalization(dataset), image_shape(dataset)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.kept[index]]

    def at_epoch(self, epoch: int) -> "SampleSubset":
        """Return the subset as seen in an epoch (from 1)."""
        return SampleSubset(at_epoch(self.dataset, epoch), self.kept)

    def uncached(self) -> "SampleSubset":
        """Return the same samples without caches, decoded each time they are read."""
        return SampleSubset(uncached(self.dataset), self.kept)

    def without_batch_augmentation(self) -> "SampleSubset":
        """Return the same images without the augmentation of whole batches. Only for sets of images."""
        return SampleSubset(self.dataset.without_batch_augmentation(), self.kept)  # type: ignore[attr-defined]

    def load_batch(self, indices: Sequence[int], batch_id: BatchId | None = None) -> Any:
        """Return collated inputs and labels, loaded as the whole set loads them."""
        return load_batch(self.dataset, [self.kept[index] for index in indices], batch_id)

    def augment_batch(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Augment a whole batch as the whole set does. Only for sets of images."""
        return self.dataset.augment_batch(images, [self.kept[index] for index in indices])  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        """Return a name for the sample: its index in the whole set and its file, if known."""
        return describe(self.dataset, self.kept[index])

    def signature(self, index: int) -> str:
        """Return the sample's signature in the whole set."""
        return self.dataset.signature(self.kept[index])  # type: ignore[attr-defined]


def at_epoch(dataset: Dataset[Any], epoch: int) -> Dataset[Any]:
    """Return `dataset` as seen in an epoch (from 1), or itself if it does not depend on the epoch."""
    return dataset.at_epoch(epoch) if hasattr(dataset, "at_epoch") else dataset


def uncached(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return `dataset` without caches, or itself if it has none."""
    return dataset.uncached() if hasattr(dataset, "uncached") else dataset


def describe(dataset: Dataset[Any], index: int) -> str:
    """Return a name for the sample in messages: its index, and its file if the data set knows it."""
    return f"index {index}" + (f" ({dataset.describe(index)})" if hasattr(dataset, "describe") else "")


def digest_files(*datasets: Any) -> str:
    """Return 32 hex digits over the signatures of all samples, in order."""
    hashed = xxhash.xxh3_128()
    for dataset in datasets:
        hashed.update(f"{len(dataset)} samples\n".encode())
        for index in range(len(dataset)):
            hashed.update(dataset.signature(index).encode(errors="surrogateescape"))
    return hashed.hexdigest()


def normalization(dataset: Dataset[Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation per channel, of pixels scaled to 0…1, for uint8 images."""
    return getattr(dataset, "normalization", (IMAGENET_MEAN, IMAGENET_STD))


def image_shape(dataset: Dataset[Any]) -> tuple[int, ...] | None:
    """Return (channels, height, width) of all inputs, None if the data set does not know it without loading one."""
    return getattr(dataset, "image_shape", None)


def load_sample(dataset: Dataset[Any], index: int, load: Callable[[int], Any] | None = None) -> Any:
    """Return `dataset[index]`, with any exception turned into a `UsageError` that names the sample.

    Args:
        dataset: The data set, for the sample's name.
        index: Index of the sample.
        load: Called with the index instead of `dataset[index]`.

    Returns:
        What the data set returned, unchecked.

    Raises:
        SampleError: If the data set raises anything other than a `UsageError`, which passes.
    """
    try:
        return dataset[index] if load is None else load(index)
    except UsageError:
        raise
    except Exception as error:  # a user's data set may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise SampleError(
            f"data.name: the sample at {describe(dataset, index)} cannot be loaded: "
            f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno}). "
            "Fix the sample or the data set, or skip such samples: --data.on_error skip.",
            code="sample-not-loaded",
            key="data.name",
            index=index,
        ) from error


def load_batch(dataset: Dataset[Any], indices: Sequence[int], batch_id: BatchId | None = None) -> Any:
    """Return collated inputs and labels, by the data set's `load_batch` or sample by sample.

    Args:
        dataset: The data set.
        indices: Indices of the samples.
        batch_id: Identifies the batch for replicas that share decoded images. None loads it in this process alone.

    Returns:
        What `default_collate` makes of the samples: usually inputs (batch, ...) and labels int64 (batch,).

    Raises:
        UsageError: If a sample cannot be loaded. `default_collate` raises its own errors.
    """
    if hasattr(dataset, "load_batch"):
        return dataset.load_batch(indices, batch_id)
    return default_collate([load_sample(dataset, index) for index in indices])


def _complement(indices: Sequence[int], num_samples: int) -> list[int]:
    kept = torch.ones(num_samples, dtype=torch.bool)
    kept[list(indices)] = False
    return kept.nonzero().flatten().tolist()
