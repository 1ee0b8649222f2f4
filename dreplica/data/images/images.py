"""Images: from a file, or whatever a data set gives, to uint8 tensors of one size."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import torch
from numpy.typing import NDArray
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional

from dreplica.data.cache.shared_file_cache import Item, Key, Shelf
from dreplica.data.images.augment import Augmentation, fit_image
from dreplica.data.samples import IMAGENET_MEAN, IMAGENET_STD, Place, Sample, SampleError, load_sample

_WHITE = (255, 255, 255, 255)
_LOOKED_AT = 8
"""Images that are decoded to guess how large all are."""

Exchange = Callable[[Place, Sequence[Key], Callable[[int], Item]], list[Item]]
"""Gives a batch's images that the node's replicas decode together, as `Shelf.fetch` does."""


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
        self.image_shape = (3, size, size)
        self.augmentation = Augmentation(fit_image(size)) if augmentation is None else augmentation
        self._seed, self._epoch = seed, 0
        self._cache: Shelf | None = None
        self._exchange: tuple[int, Exchange] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError for what is no image."""
        images, labels = self.load_batch([index])
        return images[0], int(labels[0])

    def load_batch(self, indices: Sequence[int], place: Place | None = None) -> tuple[Tensor, Tensor]:
        """Images, uint8 (batch, 3, size, size), and labels, int64 (batch,).

        `place`: which batch of a pass it is, for the replicas that share it; None: this process alone loads it.
        """
        if self._exchange is None or place is None:
            items = self._load(indices)
        else:
            part, fetch = self._exchange
            keys = [(part, self._epoch, place[0], index) for index in indices]
            items = fetch(place, keys, lambda position: self._load([indices[position]])[0])
        images, labels = default_collate([(torch.from_numpy(pixels), label) for pixels, label in items])
        return self.augment_batch(images, indices), labels

    def augment_batch(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """What is done with a whole batch. `images`: as `load_batch` gives them, but for this; may be overwritten."""
        batched = self.augmentation.batched
        return images if batched is None else batched(images, self._seed, self._epoch, indices)

    def _load(self, indices: Sequence[int]) -> list[Item]:
        if self._cache is None:
            return [load_sample(self, index, self._make) for index in indices]
        slots = [(index, (0, 0, 0, index)) for index in indices]
        kept = self._cache.fetch(slots, lambda position: load_sample(self, indices[position], self._make_to_keep))
        if self.augmentation.transform is None:
            return kept
        return [
            load_sample(self, index, partial(self._transform, item)) for index, item in zip(indices, kept, strict=True)
        ]

    def _make(self, index: int) -> Item:
        image, label = self._decode(index)
        return _pixels(self.augmentation.one(image, self._seed, self._epoch, index)), label

    def _make_to_keep(self, index: int) -> Item:
        """Before anything is drawn at random. (3, H, W), or (H, W, 3) where PIL goes on with it."""
        image, label = self._decode(index)
        return (_pixels(image) if self.augmentation.transform is None else numpy.asarray(image)), label

    def _transform(self, kept: Item, index: int) -> Item:
        image = PIL.Image.fromarray(kept[0])
        return _pixels(self.augmentation.one(image, self._seed, self._epoch, index)), kept[1]

    def _decode(self, index: int) -> tuple[PIL.Image.Image, int]:
        """Fitted, where that comes first. Raises SampleError for what is no image."""
        try:
            image, label = self.source[self.positions[index]]
            image = to_rgb(image)
        except UnreadableImageError as error:
            raise SampleError(
                f"data.root: the sample at index {index} ({self.describe(index)}) {error}. "
                "Replace or remove it, or leave such samples out: --data.on_error skip."
            ) from error
        fit = self.augmentation.fit
        return (image if fit is None else fit(image)), int(label)

    def at_epoch(self, epoch: int) -> "Images":
        """The view of an epoch: the same images, augmented otherwise."""
        view = copy.copy(self)
        view._epoch = epoch
        return view

    def sharing(self, cache: Shelf | None = None, part: int = 0, exchange: Exchange | None = None) -> "Images":
        """The same images, of which decoded ones are kept in `cache` and batches are shared by way of `exchange`, which
        serves several data sets; `part`: which of them this is."""
        view = copy.copy(self)
        view._cache, view._exchange = cache, None if exchange is None else (part, exchange)
        return view

    def by_itself(self) -> "Images":
        """The same images, decoded anew each time."""
        return self.sharing()

    def without_batched(self) -> "Images":
        """The same images without what is done with a whole batch."""
        view = copy.copy(self)
        view.augmentation = replace(self.augmentation, batched=None)
        return view

    def bytes_kept(self) -> float:
        """What a cache takes for each image; a guess from a few of them where sizes differ."""
        if self.augmentation.fit is not None:
            return 3 * self.size**2
        sizes = []
        for index in range(0, len(self), -(-len(self) // _LOOKED_AT)):
            try:
                sizes.append(self._make_to_keep(index)[0].nbytes)
            except SampleError:  # reported when it is trained on, or skipped
                continue
        return sum(sizes) / max(1, len(sizes))

    def signature(self, index: int) -> str:
        """What the source tells of the sample, for the digest; only of files."""
        return self.source.signature(self.positions[index])

    def describe(self, index: int) -> str:
        """The file, or what the source says of the sample."""
        position = self.positions[index]
        return self.source.describe(position) if hasattr(self.source, "describe") else f"its sample {position}"


def _pixels(image: PIL.Image.Image) -> NDArray[numpy.uint8]:
    return numpy.asarray(image).transpose(2, 0, 1).copy()


class UnreadableImageError(ValueError):
    """What is wrong with a file, as the end of a sentence."""


def read_image(path: str) -> PIL.Image.Image:
    """The image in a file, turned upright as its EXIF orientation says. Raises UnreadableImageError."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies what is upright
            return image
    except FileNotFoundError:
        what = "is a link to a file that is not there" if os.path.islink(path) else "is not there any more"
        raise UnreadableImageError(what) from None
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
    mode, is_transparent = str(image.mode), "transparency" in image.info
    if mode == "RGB" and not is_transparent:
        return image
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bits(image)
    if mode == "F":
        raise UnreadableImageError("has floats for pixels; convert it to 8 or 16 bits")
    if mode in {"RGBA", "RGBa", "LA", "La", "PA"} or is_transparent:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError(f"has pixels of {values.min()} to {values.max()}; convert it to 8 or 16 bits")
    values[values == image.info.get("transparency", -1)] = 65535
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
        except OSError:  # a link to nowhere or to itself, say
            size = -1
        return f"{self.files[position]}\0{self.labels[position]}\0{size}\n"
