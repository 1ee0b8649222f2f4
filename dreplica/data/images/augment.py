"""Augmentation whose randomness is a function of (seed.augment, epoch, sample index) alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
"""An RGB image to an RGB image of the size that is trained on."""


@dataclass(frozen=True)
class Augmentation:
    """What becomes of an image: it is fitted, transformed by itself, shifted and flipped with its batch; or some of
    these."""

    fit: Transform | None = None
    """Draws nothing, and gives images that are all of one size. None: the transform takes, and needs, the whole."""
    transform: Transform | None = None
    """Draws at random."""
    batched: ShiftFlip | None = None
    only_torch: bool = True
    """Whether `transform` draws from torch's generator alone, as all of torchvision's v2 do; a user's function may draw
    from any."""

    def one(self, image: Image, seed: int, epoch: int, index: int) -> Image:
        """The fitted image, transformed as it is in that epoch; the global generators stay as they are."""
        if self.transform is None:
            return image
        with drawing_from(seed, epoch, index, self.only_torch):
            return self.transform(image)


_VALIDATION_RATIO = 256 / 224
"""How much longer than the crop the shorter side is, before the middle is cut out: the usual evaluation on ImageNet."""

_LONGEST = 16
"""Of an image that is longer than so many times its width, only the middle is looked at."""

NAMES = ("flip", "crop_flip", "resized_crop", "trivial")


def make_augmentation(config: DataConfig, size: int) -> Augmentation | None:
    """What `data.augment` names; None for null. Raises UsageError if there is no such.

    All but a user's own function compute on PIL images in integers, so that neither the number of threads nor the
    processor's vector instructions can change a pixel.
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
        "Or name a function of yours: package.module:function."
    )


def fit_image(size: int, ratio: float = _VALIDATION_RATIO) -> Transform:
    """Resizes the shorter side to `size` times `ratio`, and cuts the middle out. An image that already is `size` square
    stays as it is."""
    return _Fit(size, v2.Compose([v2.Resize(round(size * ratio)), v2.CenterCrop(size)]))


class _Fit:
    def __init__(self, size: int, transform: Transform) -> None:
        self.size, self.transform = size, transform

    def __call__(self, image: Image) -> Image:
        return image if image.size == (self.size, self.size) else self.transform(_without_far_ends(image))


def _without_far_ends(image: Image) -> Image:
    """A strip, which as wide as the model's images would be thousands of times as long, is cut to its middle first."""
    short, (width, height) = min(image.size), image.size
    if max(image.size) <= _LONGEST * short:
        return image
    return functional.center_crop(image, [min(height, _LONGEST * short), min(width, _LONGEST * short)])


class _UserFunction:
    """A user's function, and what makes an image of the right size of its result."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.fit = path, fit_image(size)
        self.function = import_function("data.augment", path)

    def __call__(self, image: Image) -> Image:
        result = self.function(functional.pil_to_tensor(image))
        if not isinstance(result, Tensor) or result.dtype is not torch.uint8 or result.shape[:-2] != (3,):
            found = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(
                f"data.augment: {self.path!r} returned {found}. Return an image as it was given: uint8, (3, H, W)."
            )
        return self.fit(functional.to_pil_image(result))


@contextmanager
def drawing_from(seed: int, epoch: int, index: int, only_torch: bool = False) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's CPU generator start from (seed, epoch, index), and torch uses one thread,
    as it does in a loader's worker. Afterwards all are as they were, byte for byte.

    `only_torch`: the other two are left alone, which takes a tenth of the time: NumPy needs 60 us to give its state,
    and as long to take it back.
    """
    words = numpy.random.SeedSequence((seed, epoch, index)).generate_state(6)
    others = None if only_torch else (random.getstate(), numpy.random.get_state())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    if others is not None:
        random.seed(words[:2].tobytes())
        numpy.random.seed(words[2:4])
    # Not torch.manual_seed, which would reach the GPU's generators, too.
    torch.default_generator.manual_seed(int.from_bytes(words[4:].tobytes(), "little", signed=True))
    if threads > 1:  # a sum over an image, as in adjust_contrast, rounds by the number of threads
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
