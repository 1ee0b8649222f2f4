"""`package.module:function`: data sets from a user's function, checked before the first step."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy
import PIL.Image
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dreplica.config.imports import call_function
from dreplica.config.messages import show
from dreplica.config.reads import Reads
from dreplica.config.schema import DataConfig
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import Images
from dreplica.data.samples import DataSets, Sample, load_sample
from dreplica.data.sources.image_settings import SOURCE_SETTINGS, check_no_image_settings, check_no_source_settings
from dreplica.data.sources.sample_weights import make_weights
from dreplica.errors import UsageError

_ARRAYS = (Tensor, numpy.ndarray)
_LABELS = (int, float, Tensor, numpy.integer, numpy.floating)


class DataFactory(Protocol):
    """The function that `data.name` names as `package.module:function`.

    Every replica calls it once, before the model is built and seeded. It must return the same data on every replica:
    draw from a generator with a fixed seed, not from the global generators. The coordinator sends indices, so the data
    sets are map-style: `len(dataset)` and `dataset[index]`. Iterable data sets do not work.

    Samples may be augmented in `dataset[index]`. To reproduce with any number of workers, make each draw depend
    only on the index and the epoch, which a method `at_epoch(epoch)` receives, or set `data.augment`. The module
    `dreplica.data.samples` lists the other optional methods and attributes.
    """

    def __call__(self, config: DataConfig) -> tuple[Dataset[Any], Dataset[Any], int]:
        """Load the data.

        Args:
            config: The section `data` of this replica's config.

        Returns:
            Training set, validation set and the number of classes (at least 2). Each sample is (input, label): a tensor
            or NumPy array of the same shape and dtype for all samples, and an int from 0. With `data.image_size` or
            `data.augment`, the input is a PIL image of any size and mode, or a torch.uint8 tensor (3, H, W).
        """


def load_from_function(config: DataConfig, augment_seed: int) -> DataSets:
    """Call the function that `data.name` names and check what it returns.

    Args:
        config: The section `data`.
        augment_seed: `seed.augment`.

    Raises:
        UsageError: If the function cannot be called, or its result cannot be trained on.
    """
    reads = Reads()
    result = call_function("data.name", config.name, reads.of(config))
    check_no_source_settings(
        config, f"data.name is {config.name!r}, which does not read it", reads.unread(SOURCE_SETTINGS)
    )
    if not isinstance(result, Sequence) or len(result) != 3:
        raise _bad_factory(
            config,
            f"{config.name!r} returned {type(result).__name__}. "
            "Return (training set, validation set, number of classes).",
        )
    train, val, num_classes = result
    if not isinstance(num_classes, int | numpy.integer) or num_classes < 2:
        raise _bad_factory(
            config,
            f"{config.name!r} returned {show(num_classes)} as the number of classes. "
            "Return an int of at least 2; labels start at 0.",
        )
    sets = {f"the training set of {config.name!r}": train, f"the validation set of {config.name!r}": val}
    for which, dataset in sets.items():
        _check_map_style(config, which, dataset)
    described = f"{config.name} {len(train)} {len(val)} {num_classes}"
    weights = make_weights(config, _labels(train) if config.sample_weights == "balanced" else None)
    as_images = config.augment is not None or config.image_size is not None
    sample, _ = [_check_first_sample(config, which, dataset, as_images) for which, dataset in sets.items()]
    if as_images:
        train, val = _as_images(config, train, val, sample, augment_seed)
    return DataSets(train, val, int(num_classes), xxhash.xxh3_128_hexdigest(described.encode()), weights)


def _bad_factory(config: DataConfig, problem: str) -> UsageError:
    return UsageError(f"data.name: {problem}", code="bad-factory", key="data.name", value=config.name)


def _check_map_style(config: DataConfig, which: str, dataset: Any) -> None:
    if (
        not hasattr(type(dataset), "__len__")
        or not hasattr(type(dataset), "__getitem__")
        or isinstance(dataset, IterableDataset)
    ):
        raise _bad_factory(
            config,
            f"{which} is {type(dataset).__name__}, which cannot be read by index. Return a map-style data set, with "
            "len(dataset) and dataset[index]: the coordinator sends indices.",
        )
    if len(dataset) == 0:
        raise _bad_factory(config, f"{which} is empty. Return at least one sample.")


def _check_first_sample(config: DataConfig, which: str, dataset: Any, as_image: bool) -> Any:
    """Return the first sample that loads, after checking its type, or None if none loads.

    A sample that does not load is reported, or skipped, later.
    """
    sample = _first_sample(dataset)
    if sample is None:
        return None
    found = type(sample).__name__
    if isinstance(sample, tuple | list):
        found = f"({', '.join(type(item).__name__ for item in sample)})"
        inputs = (Tensor, PIL.Image.Image) if as_image else _ARRAYS
        if len(sample) == 2 and isinstance(sample[0], inputs) and _is_label(sample[1]):
            return sample
    if as_image:
        expected = "a PIL image or a torch.uint8 tensor (3, H, W), and an int."
    else:
        expected = "a tensor and an int, or a PIL image and an int with data.image_size set."
    raise _bad_factory(config, f"the first sample of {which} is {found}. Return (input, label): {expected}")


def _is_label(value: Any) -> bool:
    return isinstance(value, _LABELS) and getattr(value, "ndim", 0) == 0


def _first_sample(dataset: Any) -> Any:
    """Return the first sample that loads, None if none does."""
    for index in range(len(dataset)):
        try:
            return load_sample(dataset, index)
        except UsageError:
            continue
    return None


def _as_images(
    config: DataConfig, train: Dataset[Any], val: Dataset[Any], sample: Any, augment_seed: int
) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Return the sets, of PIL images or uint8 tensors (3, H, W), resized and augmented as the section says.

    `sample` is one of the training set. If it is None, none loads, and loading the first raises the UsageError.
    """
    image, _ = load_sample(train, 0) if sample is None else sample
    if isinstance(image, Tensor) and (image.dtype is not torch.uint8 or image.dim() != 3):
        check_no_image_settings(config, f"{config.name!r} returns {image.dtype} of shape {tuple(image.shape)}")
    size = config.image_size
    if size is None:
        size = min(image.shape[-2:]) if isinstance(image, Tensor) else min(image.size)
    return (
        Images(train, None, size, make_augmentation(config, size), augment_seed),
        Images(val, None, size),
    )


def _labels(dataset: Any) -> list[int] | None:
    """Return the labels of all samples if the data set holds them, None if not."""
    for name in ("labels", "targets"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            try:
                return [int(value) for value in values]
            except (TypeError, ValueError):
                raise UsageError(
                    f"data.sample_weights: 'balanced' needs the classes of all samples as ints, but {name!r} of the "
                    f"training set begins with {show(values[0])}. Store an int for each sample there, or use null.",
                    code="labels-not-ints",
                    key="data.sample_weights",
                ) from None
    return None
