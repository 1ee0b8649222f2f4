"""Augmentation whose randomness depends only on (seed.augment, epoch, sample index)."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dreplica.config.imports import import_function
from dreplica.config.messages import nearest
from dreplica.config.schema import DataConfig
from dreplica.data.images.batch_augment import ShiftFlip
from dreplica.errors import UsageError

Transform = Callable[[Image], Image]
"""Turns an RGB image into an RGB image of the size that is trained on."""


class AugmentFunction(Protocol):
    """The function that `data.augment` names as `package.module:function`.

    It is called for each training sample in each epoch. Inside, the global generators of Python, NumPy and torch (CPU)
    are seeded from (seed.augment, epoch, index), so draw from them freely. Afterwards they are restored. torch uses one
    thread, because sums round differently with more. The result must depend only on the image and these draws.
    """

    def __call__(self, image: Tensor) -> Tensor:
        """Augment one image.

        Args:
            image: uint8 (3, H, W), RGB, in the size in which it is stored.

        Returns:
            uint8 (3, H', W') of any size. It is resized and cropped to `data.image_size`.
        """


@dataclass(frozen=True)
class Augmentation:
    """The steps that turn a decoded image into a training image: fit, then transform, then the batch augmentation."""

    fit: Transform | None = None
    """Resizes an image to the size that is trained on, without random draws. None: the transform needs the whole."""
    transform: Transform | None = None
    """Transforms an image with random draws."""
    batched: ShiftFlip | None = None
    """Augments a whole batch, with draws that depend on each sample's index."""
    only_torch: bool = True
    """True if `transform` draws from torch's generator only, as torchvision's v2 do. A user's may draw from any."""

    def apply(self, image: Image, seed: int, epoch: int, index: int) -> Image:
        """Transform a fitted image without changing the state of the global generators.

        Args:
            image: The image after `fit`.
            seed: `seed.augment`.
            epoch: The epoch (from 1).
            index: Index of the sample in its data set.
        """
        if self.transform is None:
            return image
        with seeded_generators(seed, epoch, index, self.only_torch):
            return self.transform(image)


_VALIDATION_RATIO = 256 / 224
"""Length of the shorter side before the center crop, relative to the crop: the usual evaluation on ImageNet."""

_MAX_ASPECT_RATIO = 16
"""Aspect ratio to which longer images are cropped around their center."""

NAMES = ("flip", "crop_flip", "resized_crop", "trivial")


def make_augmentation(config: DataConfig, size: int) -> Augmentation | None:
    """Return the augmentation that `data.augment` names, None for null.

    All except a user's function compute on PIL images in integers, so that neither the number of threads nor the CPU's
    vector instructions change a pixel.

    Raises:
        UsageError: If there is no such augmentation.
    """
    name = config.augment
    if name is None:
        return None
    if ":" in name:
        return Augmentation(transform=_UserFunction(name, size), only_torch=False)
    if name == "flip":
        return Augmentation(fit_image(size), batched=ShiftFlip())
    if name == "crop_flip":
        return Augmentation(fit_image(size, ratio=1.0), batched=ShiftFlip(padding=4))
    if name == "resized_crop":
        return Augmentation(transform=v2.RandomResizedCrop(size), batched=ShiftFlip())
    if name == "trivial":
        return Augmentation(fit_image(size), v2.TrivialAugmentWide())
    raise UsageError(
        f"data.augment: there is no augmentation {name!r}. {nearest(name, NAMES)} "
        "Or name your own function: package.module:function.",
        code="unknown-augmentation",
        key="data.augment",
        value=name,
    )


def fit_image(size: int, ratio: float = _VALIDATION_RATIO) -> Transform:
    """Return a transform that resizes the shorter side to `size * ratio` and crops the center.

    An image that is already `size` x `size` is not changed.
    """
    return _Fit(size, v2.Compose([v2.Resize(round(size * ratio)), v2.CenterCrop(size)]))


class _Fit:
    def __init__(self, size: int, transform: Transform) -> None:
        self.size, self.transform = size, transform

    def __call__(self, image: Image) -> Image:
        return image if image.size == (self.size, self.size) else self.transform(_limit_aspect_ratio(image))


def _limit_aspect_ratio(image: Image) -> Image:
    """Crop a strip to its center, as resizing it to the model's width could make it thousands of times as long."""
    short, (width, height) = min(image.size), image.size
    if max(image.size) <= _MAX_ASPECT_RATIO * short:
        return image
    return functional.center_crop(
        image, [min(height, _MAX_ASPECT_RATIO * short), min(width, _MAX_ASPECT_RATIO * short)]
    )


class _UserFunction:
    """A transform that calls a user's `AugmentFunction` and fits its result to the size."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.fit = path, fit_image(size)
        self.function: AugmentFunction = import_function("data.augment", path)

    def __call__(self, image: Image) -> Image:
        result = self.function(functional.pil_to_tensor(image))
        if not isinstance(result, Tensor) or result.dtype is not torch.uint8 or result.shape[:-2] != (3,):
            found = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(
                f"data.augment: {self.path!r} returned {found}. Return an image like the argument: uint8, (3, H, W).",
                code="bad-factory",
                key="data.augment",
                value=self.path,
            )
        return self.fit(functional.to_pil_image(result))


@contextmanager
def seeded_generators(seed: int, epoch: int, index: int, only_torch: bool = False) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and torch inside, and restore them byte for byte afterwards.

    Inside, torch uses one thread, as in a loader's worker.

    Args:
        seed: `seed.augment`.
        epoch: The epoch (from 1).
        index: Index of the sample.
        only_torch: Leave the generators of Python and NumPy alone, which takes a tenth of the time: NumPy needs 60 us
            to return its state, and as long to restore it.
    """
    words = numpy.random.SeedSequence((seed, epoch, index)).generate_state(6)
    others = None if only_torch else (random.getstate(), numpy.random.get_state())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    if others is not None:
        random.seed(words[:2].tobytes())
        numpy.random.seed(words[2:4])
    # Not torch.manual_seed, which also seeds the generators of GPUs.
    torch.default_generator.manual_seed(int.from_bytes(words[4:].tobytes(), "little", signed=True))
    if threads > 1:  # a sum over an image, as in adjust_contrast, rounds differently with another number of threads
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
        torch.set_rng_state(state)
        if others is not None:
            random.setstate(others[0])
            numpy.random.set_state(others[1])
