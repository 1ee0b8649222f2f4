"""Folders of images cut from scikit-learn's pictures, in different sizes, modes and file formats."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy
import PIL.Image
from PIL.Image import Image

CLASSES = ("china", "flower")


@cache
def photographs() -> dict[str, Image]:
    """Return the two pictures, 640 x 427, by class."""
    from sklearn.datasets import load_sample_images  # takes a second, so not in every process that imports this module

    images = load_sample_images().images
    return {name: PIL.Image.fromarray(pixels) for name, pixels in zip(CLASSES, images, strict=True)}


def cut(name: str, number: int) -> Image:
    """Return piece `number` of a picture, RGB, 40 to 71 pixels wide and 36 to 75 high."""
    width, height = 40 + 7 * number % 32, 36 + 11 * number % 40
    left, top = 53 * number % (640 - width), 37 * number % (427 - height)
    return photographs()[name].crop((left, top, left + width, top + height))


def _save_palette(image: Image, path: Path) -> None:
    image.quantize(64).save(path.with_suffix(".png"), transparency=3)


def _save_rotated(image: Image, path: Path) -> None:
    """Save it rotated, with the EXIF tag that says so."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif)


def _save_16_bits(image: Image, path: Path) -> None:
    values = numpy.asarray(image.convert("L")).astype(numpy.uint16) * 257
    PIL.Image.fromarray(values).save(path.with_suffix(".png"))


FORMATS: tuple[Callable[[Image, Path], None], ...] = (
    lambda image, path: image.save(path.with_suffix(".jpg"), quality=90),
    lambda image, path: image.convert("L").save(path.with_suffix(".jpeg")),
    lambda image, path: image.convert("CMYK").save(path.with_suffix(".jpg")),
    _save_palette,
    _save_rotated,
    _save_16_bits,
    lambda image, path: image.convert("RGBA").save(path.with_suffix(".png")),
    lambda image, path: image.convert("1").save(path.with_suffix(".bmp")),
)


def make_folder(root: Path, num_each: int = 12) -> Path:
    """Create a folder per class in `root` with `num_each` images each, in all formats in turn."""
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(num_each):
            FORMATS[number % len(FORMATS)](cut(name, number), root / name / f"{number:02}")
    return root
