"""Data sets by name: what there is to train and validate on."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy
import PIL.Image
import torch
import xxhash
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset

from dreplica.config.imports import call_function
from dreplica.config.messages import nearest, show
from dreplica.config.schema import DataConfig
from dreplica.data.image_sharing import keep_and_share, keep_on_device
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import Images
from dreplica.data.loading.unreadable import leave_out_unreadable
from dreplica.data.samples import DataSets, Sample, TensorImages, load_sample, split_indices
from dreplica.data.sources.image_folder import load_image_folder
from dreplica.data.sources.sample_weights import make_weights
from dreplica.data.sources.torchvision_datasets import SETS, load_torchvision_set
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError

_ARRAYS = (Tensor, numpy.ndarray)
_LABELS = (int, float, Tensor, numpy.integer, numpy.floating)
_DIGITS_SIZE = 32
_DIGITS_MEAN, _DIGITS_STD = 0.3053, 0.3761
"""Of the pixels, scaled to 0…1; written down because a mean computed here would round by the number of threads."""


def load_data(config: DataConfig, augment_seed: int = 0) -> DataSets:
    """The data sets that `data.name` names. Raises UsageError if there is no such.

    `augment_seed`: `seed.augment`.
    """
    if config.name == "digits":
        return _digits(config)
    if config.name == "imagefolder":
        return load_image_folder(config, augment_seed)
    if ":" in config.name:
        return _from_function(config, augment_seed)
    if config.name in SETS:
        return load_torchvision_set(config, augment_seed)
    raise UsageError(
        f"data.name: there is no data set {config.name!r}. {nearest(config.name, ['digits', 'imagefolder', *SETS])} "
        "Or name a function of yours: package.module:function."
    )


def _digits(config: DataConfig) -> DataSets:
    """scikit-learn's digits: 8x8 grey images, scaled to 32x32, three equal channels. Mean 0; deviation 1 before the
    scaling, which smooths."""
    from sklearn.datasets import load_digits  # imported when used: it takes a second

    _refuse_image_settings(config, "digits are floats, made once at the start")
    bunch: Any = load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    images = interpolate(small, size=(_DIGITS_SIZE, _DIGITS_SIZE), mode="bilinear", align_corners=False)
    images = ((images - _DIGITS_MEAN) / _DIGITS_STD).expand(-1, 3, -1, -1).contiguous()
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


def _from_function(config: DataConfig, augment_seed: int) -> DataSets:
    result = call_function("data.name", config.name, config)
    if not isinstance(result, Sequence) or len(result) != 3:
        raise UsageError(
            f"data.name: {config.name!r} returned {type(result).__name__}. "
            "Return (training set, validation set, number of classes)."
        )
    train, val, num_classes = result
    if not isinstance(num_classes, int | numpy.integer) or num_classes < 2:
        raise UsageError(
            f"data.name: {config.name!r} returned {show(num_classes)} as the number of classes. "
            "Return an int, 2 or more; labels count from 0."
        )
    for key, part in (("training", train), ("validation", val)):
        _check_set(f"the {key} set of {config.name!r}", part)
    described = f"{config.name} {len(train)} {len(val)} {num_classes}"
    weights = make_weights(config, _labels(train) if config.sample_weights == "balanced" else None)
    as_images = config.augment is not None or config.image_size is not None
    sample, _ = [
        _check_first_sample(f"the {key} set of {config.name!r}", part, as_images)
        for key, part in (("training", train), ("validation", val))
    ]
    if as_images:
        train, val = _as_images(config, train, val, sample, augment_seed)
    return DataSets(train, val, int(num_classes), xxhash.xxh3_128_hexdigest(described.encode()), weights)


def _check_set(which: str, part: Any) -> None:
    if (
        not hasattr(type(part), "__len__")
        or not hasattr(type(part), "__getitem__")
        or isinstance(part, IterableDataset)
    ):
        raise UsageError(
            f"data.name: {which} is {type(part).__name__}, which cannot be read by index. Return a map-style data set, "
            "with len(...) and [index]: the coordinator sends indices."
        )
    if len(part) == 0:
        raise UsageError(f"data.name: {which} is empty. Return at least one sample.")


def _check_first_sample(which: str, part: Any, as_image: bool) -> Any:
    """The first sample that can be loaded, if it is one; which cannot is told, or skipped, later on. None if none can.

    Raises UsageError for what is no sample.
    """
    sample = _first_sample(part)
    what = type(sample).__name__
    if isinstance(sample, tuple | list):
        what = f"({', '.join(type(item).__name__ for item in sample)})"
        inputs = (Tensor, PIL.Image.Image) if as_image else _ARRAYS
        if len(sample) == 2 and isinstance(sample[0], inputs) and _is_label(sample[1]):
            return sample
    if sample is None:
        return None
    wanted = "a PIL image, or a tensor of bytes (torch.uint8, 3 x H x W)," if as_image else "a tensor"
    raise UsageError(
        f"data.name: the first sample of {which} is {what}. Let it be (input, label), {wanted} and an int"
        + ("." if as_image else "; or a PIL image and an int, and set data.image_size.")
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, _LABELS) and getattr(value, "ndim", 0) == 0


def _first_sample(part: Any) -> Any:
    """The first that can be loaded; None if none can."""
    for index in range(len(part)):
        try:
            return load_sample(part, index)
        except UsageError:
            continue
    return None


def _as_images(
    config: DataConfig, train: Dataset[Any], val: Dataset[Any], sample: Any, augment_seed: int
) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Sets of PIL images, or of uint8 tensors (3, H, W), resized and augmented as the section says. `sample`: one of
    the training set; None if none can be loaded, which raises UsageError."""
    image, _ = load_sample(train, 0) if sample is None else sample
    if isinstance(image, Tensor) and (image.dtype is not torch.uint8 or image.dim() != 3):
        _refuse_image_settings(config, f"{config.name!r} gives {image.dtype} of shape {tuple(image.shape)}")
    size = config.image_size
    if size is None:
        size = min(image.shape[-2:]) if isinstance(image, Tensor) else min(image.size)
    return (
        Images(train, None, size, make_augmentation(config, size), augment_seed),
        Images(val, None, size),
    )


def _refuse_image_settings(config: DataConfig, because: str) -> None:
    for key in ("augment", "image_size"):
        value = getattr(config, key)
        if value is not None:
            raise UsageError(
                f"data.{key}: {value!r} is for images of bytes (torch.uint8, 3 x H x W, or PIL's), but {because}. "
                "Set it to null, or use other data."
            )


def _labels(dataset: Any) -> list[int] | None:
    """The labels of all samples, where the data set has them at hand. Raises UsageError for what are no classes."""
    for name in ("labels", "targets"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            try:
                return [int(value) for value in values]
            except (TypeError, ValueError):
                raise UsageError(
                    f"data.sample_weights: 'balanced' needs the classes of all samples, and {name!r} of the training "
                    f"set begins with {show(values[0])}. Let it hold an int for each sample, or use null."
                ) from None
    return None


log = logging.getLogger(__name__)


def prepare_data(config: DataConfig, augment_seed: int, world: World, device: torch.device) -> DataSets:
    """What the section of this replica says. A collective. Raises SharedUsageError."""
    data = world.together(lambda: load_data(config, augment_seed))
    data = keep_and_share(data, config, world)
    if config.on_error == "skip":
        data = leave_out_unreadable(data, world.channel, config.num_workers, f"{world.host} {config.root}")
        if data.skipped and world.is_coordinator:
            log.warning("data.on_error: skipped %d samples:\n  %s", len(data.skipped), "\n  ".join(data.skipped))
    world.together(lambda: _check_batch_size(config, len(data.train)))  # type: ignore[arg-type]
    return keep_on_device(data, config, device, world)


def _check_batch_size(config: DataConfig, num_samples: int) -> None:
    if config.batch_size > num_samples:
        raise UsageError(
            f"data.batch_size: {config.batch_size} is more than the {num_samples} samples of the training set. "
            f"Choose {num_samples} or fewer."
        )
