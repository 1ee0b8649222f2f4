"""`data.cache: device`: decoded images in one tensor on the replica's device, from which batches are assembled."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreplica.data.samples import Sample, at_epoch, image_shape, normalization, uncached
from dreplica.state.tensors import to_device


class DeviceImageStore:
    """Storage for decoded images of one size on a device, and for their labels on the CPU.

    Args:
        num_samples: Number of images.
        size: Height and width in pixels.
        device: The device of `images`, uint8 (num_samples, 3, size, size).
    """

    def __init__(self, num_samples: int, size: int, device: torch.device) -> None:
        self.images = torch.empty((num_samples, 3, size, size), dtype=torch.uint8, device=device)
        self.labels = torch.empty(num_samples, dtype=torch.int64)
        self.is_stored = torch.zeros(num_samples, dtype=torch.bool)


class DeviceCachedImages(Dataset[Sample]):
    """A set of images that are stored on the device once loaded; the loader then assembles batches there.

    Images are stored before augmentation. Shifts and flips move bytes and compute nothing, and their draws depend only
    on (seed, epoch, index). So the pixels equal those of the set without a cache, on any device.

    Args:
        dataset: `Images`, or a `SampleSubset` of such, with no augmentation except that of whole batches.
        store: Storage for as many images.
    """

    def __init__(self, dataset: Any, store: DeviceImageStore) -> None:
        self.dataset, self.store = dataset, store
        self.normalization, self.image_shape = normalization(dataset), image_shape(dataset)
        self.source: Dataset[Sample] = dataset.without_batch_augmentation()
        """The images before augmentation, which the loader's workers load."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]

    def at_epoch(self, epoch: int) -> "DeviceCachedImages":
        """Return the set as seen in an epoch. All epochs share the storage."""
        return DeviceCachedImages(at_epoch(self.dataset, epoch), self.store)

    def uncached(self) -> Dataset[Sample]:
        """Return the same images, decoded each time they are read."""
        return uncached(self.dataset)

    def describe(self, index: int) -> str:
        """Return a name for the sample, such as its file."""
        return self.dataset.describe(index)

    @property
    def is_complete(self) -> bool:
        """True once every image is stored."""
        return bool(self.store.is_stored.all())

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return stored images, not augmented, and their labels.

        Returns:
            Images uint8 (batch, 3, size, size) on the device, and labels int64 (batch,) on the CPU.
        """
        store = self.store
        return store.images.index_select(0, to_device(indices, store.images.device)), store.labels[indices]

    def store_and_augment(self, indices: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Store the images that are new, and return all augmented for this epoch.

        Args:
            indices: Indices of the samples, int64 (batch,), on the CPU.
            images: uint8 (batch, 3, size, size) on the device, not augmented. It may be overwritten.
            labels: int64 (batch,) on the CPU.
        """
        store = self.store
        if not bool(store.is_stored[indices].all()):
            store.images.index_copy_(0, to_device(indices, store.images.device), images)
            store.labels[indices] = labels
            store.is_stored[indices] = True
        return self.dataset.augment_batch(images, indices.tolist())
