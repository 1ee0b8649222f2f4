"""Images from files or any data set, decoded to uint8 tensors of one size."""

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

from dreplica.data.cache.shared_file_cache import Item, Key, SharedFileCache
from dreplica.data.images.augment import Augmentation, fit_image
from dreplica.data.samples import IMAGENET_MEAN, IMAGENET_STD, BatchId, Sample, SampleError, load_sample
from dreplica.errors import DreplicaError

_WHITE = (255, 255, 255, 255)
_NUM_PROBED = 8
"""Number of images that are decoded to estimate the size of all."""

BatchExchange = Callable[[BatchId, Sequence[Key], Callable[[int], Item]], list[Item]]
"""Returns a batch's images, which the node's replicas decode together, as `SharedFileCache.fetch` does."""


class Images(Dataset[Sample]):
    """A data set of images, uint8 (3, size, size), with labels.

    Args:
        source: A map-style data set of (PIL image or uint8 tensor, label). Its `describe(index)`, if it has one, names
            the sample.
        positions: Positions in `source` of this set's samples, in order. None uses all.
        size: Height and width in pixels.
        augmentation: The augmentation. None resizes and crops the center.
        seed: `seed.augment`.
        normalization: Mean and standard deviation per channel, by which the loader normalizes.
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
        self._cache: SharedFileCache | None = None
        self._exchange: tuple[int, BatchExchange] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        """Return the image, uint8 (3, size, size), and its label. Raises SampleError if it cannot be read."""
        images, labels = self.load_batch([index])
        return images[0], int(labels[0])

    def load_batch(self, indices: Sequence[int], batch_id: BatchId | None = None) -> tuple[Tensor, Tensor]:
        """Load and augment a batch.

        Args:
            indices: Indices of the samples.
            batch_id: Identifies the batch for the replicas that share it. None loads it in this process alone.

        Returns:
            Images uint8 (batch, 3, size, size), and labels int64 (batch,).

        Raises:
            SampleError: If an image cannot be read.
        """
        if self._exchange is None or batch_id is None:
            items = self._load(indices)
        else:
            set_id, fetch = self._exchange
            keys = [(set_id, self._epoch, batch_id[0], index) for index in indices]
            items = fetch(batch_id, keys, lambda position: self._load([indices[position]])[0])
        images, labels = default_collate([(torch.from_numpy(pixels), label) for pixels, label in items])
        return self.augment_batch(images, indices), labels

    def augment_batch(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Apply the augmentation of whole batches to uint8 (batch, 3, size, size), which may be overwritten."""
        batched = self.augmentation.batched
        return images if batched is None else batched(images, self._seed, self._epoch, indices)

    def _load(self, indices: Sequence[int]) -> list[Item]:
        if self._cache is None:
            return [load_sample(self, index, self._make) for index in indices]
        slots = [(index, (0, 0, 0, index)) for index in indices]
        cached = self._cache.fetch(slots, lambda position: load_sample(self, indices[position], self._make_cacheable))
        if self.augmentation.transform is None:
            return cached
        return [
            load_sample(self, index, partial(self._transform, item))
            for index, item in zip(indices, cached, strict=True)
        ]

    def _make(self, index: int) -> Item:
        image, label = self._decode(index)
        return _pixels(self.augmentation.apply(image, self._seed, self._epoch, index)), label

    def _make_cacheable(self, index: int) -> Item:
        """Return the image before any random draw: (3, H, W), or (H, W, 3) if a PIL transform follows."""
        image, label = self._decode(index)
        return (_pixels(image) if self.augmentation.transform is None else numpy.asarray(image)), label

    def _transform(self, cached: Item, index: int) -> Item:
        image = PIL.Image.fromarray(cached[0])
        return _pixels(self.augmentation.apply(image, self._seed, self._epoch, index)), cached[1]

    def _decode(self, index: int) -> tuple[PIL.Image.Image, int]:
        """Return the decoded image, resized if the augmentation begins with that, and its label."""
        try:
            image, label = self.source[self.positions[index]]
            image = to_rgb(image)
        except UnreadableImageError as error:
            raise SampleError(
                f"data.root: the sample at index {index} ({self.describe(index)}) cannot be loaded: {error}. "
                "Replace or remove it, or skip such samples: --data.on_error skip.",
                code=error.code,
                key="data.root",
                index=index,
                sample=self.describe(index),
            ) from error
        fit = self.augmentation.fit
        return (image if fit is None else fit(image)), int(label)

    def at_epoch(self, epoch: int) -> "Images":
        """Return the same images as augmented in an epoch (from 1)."""
        view = copy.copy(self)
        view._epoch = epoch
        return view

    def with_caches(
        self, cache: SharedFileCache | None = None, set_id: int = 0, exchange: BatchExchange | None = None
    ) -> "Images":
        """Return the same images with these caches, or without any.

        Args:
            cache: Holds all decoded images.
            set_id: Identifies this set in `exchange`, which serves several sets.
            exchange: Shares the batches that replicas of a node are loading.
        """
        view = copy.copy(self)
        view._cache, view._exchange = cache, None if exchange is None else (set_id, exchange)
        return view

    def uncached(self) -> "Images":
        """Return the same images, decoded each time they are read."""
        return self.with_caches()

    def without_batch_augmentation(self) -> "Images":
        """Return the same images without the augmentation of whole batches."""
        view = copy.copy(self)
        view.augmentation = replace(self.augmentation, batched=None)
        return view

    def cached_bytes_per_image(self) -> float:
        """Return the bytes that a cache takes per image, estimated from some images if sizes differ."""
        if self.augmentation.fit is not None:
            return 3 * self.size**2
        sizes = []
        for index in range(0, len(self), -(-len(self) // _NUM_PROBED)):
            try:
                sizes.append(self._make_cacheable(index)[0].nbytes)
            except SampleError:  # reported when it is trained on, or skipped
                continue
        return sum(sizes) / max(1, len(sizes))

    def signature(self, index: int) -> str:
        """Return the line by which the source identifies the sample. Only for files."""
        return self.source.signature(self.positions[index])

    def describe(self, index: int) -> str:
        """Return the file, or the source's name for the sample."""
        position = self.positions[index]
        return self.source.describe(position) if hasattr(self.source, "describe") else f"its sample {position}"


def _pixels(image: PIL.Image.Image) -> NDArray[numpy.uint8]:
    return numpy.asarray(image).transpose(2, 0, 1).copy()


class UnreadableImageError(DreplicaError, ValueError):
    """A file or image that cannot be used as an image. The text is a clause without a full stop.

    The codes are `file-missing`, `file-empty`, `not-an-image`, `image-damaged` and `pixels-not-convertible`.
    """

    default_code = "image-damaged"


def read_image(path: str) -> PIL.Image.Image:
    """Read the image in a file, rotated as its EXIF orientation says.

    Raises:
        UnreadableImageError: If the file is missing or PIL cannot read it.
    """
    try:
        with PIL.Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies images that need no rotation
            return image
    except FileNotFoundError:
        what = "it is a link to a file that does not exist" if os.path.islink(path) else "the file no longer exists"
        raise UnreadableImageError(what, code="file-missing") from None
    except UnidentifiedImageError:
        if os.path.getsize(path) == 0:
            raise UnreadableImageError("the file is empty", code="file-empty") from None
        raise UnreadableImageError("it is not an image that PIL can read", code="not-an-image") from None
    # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error, ... for damaged files.
    except Exception as error:
        raise UnreadableImageError(str(error) or type(error).__name__, code="image-damaged") from error


def to_rgb(image: PIL.Image.Image | Tensor) -> PIL.Image.Image:
    """Convert an image of any mode, or a uint8 tensor (1 or 3, H, W), to RGB.

    Grey images get three equal channels. Transparent pixels (also of a palette) are blended with white. CMYK is
    converted without a color profile. Values of 16-bit grey are divided by 257 and rounded.

    Raises:
        UnreadableImageError: For 32-bit integers beyond 16 bits and for floats, which have no defined white.
    """
    if isinstance(image, Tensor):
        return to_rgb(functional.to_pil_image(image))
    mode, is_transparent = str(image.mode), "transparency" in image.info
    if mode == "RGB" and not is_transparent:
        return image
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bits(image)
    if mode == "F":
        raise UnreadableImageError("its pixels are floats: convert it to 8 or 16 bits", code="pixels-not-convertible")
    if mode in {"RGBA", "RGBa", "LA", "La", "PA"} or is_transparent:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    values = numpy.asarray(image).astype(numpy.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImageError(
            f"its pixels range from {low} to {high}: convert it to 8 or 16 bits",
            code="pixels-not-convertible",
            low=low,
            high=high,
        )
    values[values == image.info.get("transparency", -1)] = 65535
    return PIL.Image.fromarray(((values + 128) // 257).astype(numpy.uint8)).convert("RGB")


class ImageFiles:
    """A source of images in files.

    Args:
        root: The folder.
        files: Paths relative to `root`, with forward slashes.
        labels: Label of each file.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.files, self.labels = root, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[PIL.Image.Image, int]:
        return read_image(os.path.join(self.root, self.files[position])), self.labels[position]

    def describe(self, position: int) -> str:
        """Return the path relative to the root, which is the same on every node."""
        return self.files[position]

    def signature(self, position: int) -> str:
        """Return a line with path, label and size in bytes (-1 if there is no file)."""
        try:
            size = os.path.getsize(os.path.join(self.root, self.files[position]))
        except OSError:  # for instance a dangling or circular link
            size = -1
        return f"{self.files[position]}\0{self.labels[position]}\0{size}\n"
