"""Images: from a file, or whatever a data set gives, to uint8 tensors of one size."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from dreplica.data.augment import Augmentation, fit_image
from dreplica.data.samples import IMAGENET_MEAN, IMAGENET_STD, Sample, SampleError

_WHITE = (255, 255, 255, 255)


class Images(Dataset[Sample]):
    """Samples (image uint8 (3, size, size), label) of a source, which gives (PIL image or uint8 tensor, label).

    Args:
        source: any map-style data set; its `describe(index)`, if it has one, says which sample it is.
        positions: which of its samples, in this order; None: all.
        size: height and width.
        augmentation: None: resized, and the middle cut out.
        seed: `seed.augment`.
        normalization: mean and standard deviation per channel, for the loader.
    """

    def __init__(
        self,
        source: Any,
        positions: Sequence[int] | None,
        size: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        normalization: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        self.source = source
        self.positions = range(len(source)) if positions is None else positions
        self.size, self.normalization = size, normalization
        self._fit, self._augmentation = fit_image(size), augmentation
        self._seed, self._epoch = seed, 0

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError for what is no image."""
        try:
            image, label = self.source[self.positions[index]]
            image = to_rgb(image)
        except UnreadableImageError as error:
            raise SampleError(
                f"data.root: the sample at index {index} ({self.describe(index)}) {error}. "
                "Replace or remove it, or leave such samples out: --data.on_error skip."
            ) from error
        if self._augmentation is None:
            image = self._fit(image)
        else:
            image = self._augmentation(image, self._seed, self._epoch, index)
        return functional.pil_to_tensor(image), int(label)

    def at_epoch(self, epoch: int) -> "Images":
        """The view of an epoch: the same images, augmented otherwise."""
        view = copy.copy(self)
        view._epoch = epoch
        return view

    def signature(self, index: int) -> str:
        """What the source tells of the sample, for the digest; only of files."""
        return self.source.signature(self.positions[index])

    def describe(self, index: int) -> str:
        """The file, or what the source says of the sample."""
        position = self.positions[index]
        return self.source.describe(position) if hasattr(self.source, "describe") else f"its sample {position}"


class UnreadableImageError(ValueError):
    """What is wrong with a file, as the end of a sentence."""


def read_image(path: str) -> PIL.Image.Image:
    """The image in a file, turned upright as its EXIF orientation says. Raises UnreadableImageError."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UnreadableImageError("is not there, though it was when the run began") from None
    except UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        raise UnreadableImageError("is an empty file" if empty else "is no image that PIL can read") from None
    # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, ... for what is damaged.
    except Exception as error:
        raise UnreadableImageError(f"cannot be read: {str(error) or type(error).__name__}") from error


def to_rgb(image: PIL.Image.Image | Tensor) -> PIL.Image.Image:
    """An image of any mode, or a uint8 tensor (1 or 3, H, W), as RGB. Raises UnreadableImageError.

    Grey gets three equal channels; what is transparent (also in a palette) stands on white; CMYK is converted without a
    colour profile; of 16-bit grey the values are divided by 257, rounded. 32-bit integers beyond 16 bits, and floats,
    have no white that is agreed upon: an error.
    """
    if isinstance(image, Tensor):
        return to_rgb(functional.to_pil_image(image))
    mode = str(image.mode)
    if mode == "RGB":
        return image
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bits(image)
    if mode == "F":
        raise UnreadableImageError("has floats for pixels; convert it to 8 or 16 bits")
    if mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError(f"has pixels of {values.min()} to {values.max()}; convert it to 8 or 16 bits")
    return PIL.Image.fromarray(((values + 128) // 257).astype(numpy.uint8)).convert("RGB")


class ImageFiles:
    """A source: files, and their labels."""

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.files, self.labels = root, files, labels
        """`files`: relative to `root`, with forward slashes."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[PIL.Image.Image, int]:
        return read_image(os.path.join(self.root, self.files[position])), self.labels[position]

    def describe(self, position: int) -> str:
        """The path relative to the root: the same on every node."""
        return self.files[position]

    def signature(self, position: int) -> str:
        """Path, label and size in bytes (-1: it is not there), a line."""
        try:
            size = os.path.getsize(os.path.join(self.root, self.files[position]))
        except FileNotFoundError:  # a link to nowhere, say
            size = -1
        return f"{self.files[position]}\0{self.labels[position]}\0{size}\n"
