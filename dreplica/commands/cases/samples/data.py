"""Small datasets, one correct and the others each with a fault, for `data.name`."""

import numpy
import torch
from torch import Tensor

from dreplica.config.schema import DataConfig
from dreplica.data.samples import Sample, TensorImages
from dreplica.distributed.process_group import env_rank

Sets = tuple[TensorImages, TensorImages, int]


def tiny_images(config: DataConfig) -> Sets:
    """Return five classes of noisy 8x8 images, 80 to train on and 40 to validate on."""
    return _noisy_images(80, 40, 8)


def altered_file(config: DataConfig) -> Sets:
    """Change one pixel of one training image on replica 1, as in a corrupted copy of a file.

    Number and shapes of the images are the same everywhere, so a count of files finds nothing.
    """
    train, val, num_classes = tiny_images(config)
    if env_rank() == 1:
        train.images[7, 0, 3, 3] += 1.0
    return train, val, num_classes


class _NoisyFromGlobal(TensorImages):
    """Adds noise drawn from NumPy's global generator."""

    def __getitem__(self, index: int) -> Sample:
        image, label = super().__getitem__(index)
        noise: Tensor = torch.from_numpy(numpy.random.standard_normal(image.shape)).to(image.dtype)
        return image + 0.1 * noise, label


def noise_from_global_generator(config: DataConfig) -> Sets:
    """Augment samples from the generator of the process that loads them.

    So what a sample looks like depends on the number of loader workers, and on which of them gets it when.
    """
    train, val, num_classes = tiny_images(config)
    return _NoisyFromGlobal(train.images, train.labels), val, num_classes


def threads_changed(config: DataConfig) -> Sets:
    """Set the number of threads on replica 1 while loading, as image libraries do on import."""
    if env_rank() == 1:
        torch.set_num_threads(2)
    return tiny_images(config)


def _noisy_images(num_train: int, num_val: int, size: int) -> Sets:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 3, size, size, generator=generator)
    labels = torch.arange(num_train + num_val) % 5
    images = centers[labels] + 0.5 * torch.randn(len(labels), 3, size, size, generator=generator)
    train, val = (
        TensorImages(images[:num_train], labels[:num_train]),
        TensorImages(images[num_train:], labels[num_train:]),
    )
    return train, val, 5
