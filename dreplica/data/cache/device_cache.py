"""`data.cache: device`: decoded images in one tensor on the replica's device, and batches put together there."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreplica.data.samples import Sample, at_epoch, by_itself, image_shape, normalization
from dreplica.state.tensors import to_device


class Store:
    """Images of one size, kept as they come: uint8 (samples, 3, size, size), on `device`."""

    def __init__(self, num_samples: int, size: int, device: torch.device) -> None:
        self.images = torch.empty((num_samples, 3, size, size), dtype=torch.uint8, device=device)
        self.labels = torch.empty(num_samples, dtype=torch.int64)
        self.is_there = torch.zeros(num_samples, dtype=torch.bool)


class OnDevice(Dataset[Sample]):
    """Images, of which the loader keeps each once it has been loaded, and then puts batches together by index.

    What is kept is not augmented yet. Shifts and flips move bytes and compute nothing, and they are drawn from (seed,
    epoch, index) alone: so the pixels are those that the same set gives without a cache, on any device.

    Args:
        dataset: `Images`, or a `Kept` of such, with no other augmentation than what is done with a whole batch.
        store: of as many images.
    """

    def __init__(self, dataset: Any, store: Store) -> None:
        self.dataset, self.store = dataset, store
        self.normalization, self.image_shape = normalization(dataset), image_shape(dataset)
        self.source: Dataset[Sample] = dataset.without_batched()
        """What the loader's workers load."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]

    def at_epoch(self, epoch: int) -> "OnDevice":
        """The view of an epoch; what is kept is kept for all of them."""
        return OnDevice(at_epoch(self.dataset, epoch), self.store)

    def by_itself(self) -> Dataset[Sample]:
        """The same images, decoded anew each time."""
        return by_itself(self.dataset)

    def describe(self, index: int) -> str:
        """Which sample it is."""
        return self.dataset.describe(index)

    @property
    def is_complete(self) -> bool:
        """Whether every image has been loaded."""
        return bool(self.store.is_there.all())

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 (batch, 3, size, size) on the device, not augmented; labels, int64 (batch,) on the CPU."""
        store = self.store
        return store.images.index_select(0, to_device(indices, store.images.device)), store.labels[indices]

    def keep_and_augment(self, indices: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The images as they are in this epoch, on the device; kept beforehand as `get` gives them."""
        store = self.store
        if not bool(store.is_there[indices].all()):
            store.images.index_copy_(0, to_device(indices, store.images.device), images)
            store.labels[indices] = labels
            store.is_there[indices] = True
        return self.dataset.augment_batch(images, indices.tolist())
