"""`digits`: scikit-learn's bundled images of handwritten digits."""

from typing import Any

import numpy
import torch
import xxhash
from torch.nn.functional import interpolate

from dreplica.config.schema import DataConfig
from dreplica.data.samples import DataSets, TensorImages
from dreplica.data.sources.image_settings import check_no_image_settings
from dreplica.data.sources.sample_weights import make_weights
from dreplica.data.sources.split import split_indices

_SIZE = 32
_MEAN, _STD = 0.3053, 0.3761
"""Mean and standard deviation of the pixels scaled to 0…1. Constants, as computed ones depend on the thread count."""


def load_digits(config: DataConfig) -> DataSets:
    """Load scikit-learn's 1,797 digits, 8x8 and grey, as float32 (3, 32, 32) with three equal channels.

    The mean is 0. The standard deviation is 1 before the bilinear resizing, which smooths.

    Raises:
        UsageError: If the section sets what is only for images of bytes.
    """
    from sklearn import datasets  # imported here because it takes a second

    check_no_image_settings(config, "digits are floats, created once at the start")
    bunch: Any = datasets.load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    images = interpolate(small, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    images = ((images - _MEAN) / _STD).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(numpy.asarray(bunch.target, dtype=numpy.int64))
    train, val = split_indices(len(labels), config.val_fraction, config.split_seed)
    digest = xxhash.xxh3_128(images.numpy().data)
    digest.update(labels.numpy().data)
    return DataSets(
        TensorImages(images[train], labels[train]),
        TensorImages(images[val], labels[val]),
        10,
        digest.hexdigest(),
        make_weights(config, labels[train].tolist()),
    )
