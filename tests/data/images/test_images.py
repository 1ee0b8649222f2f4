"""Tests of images of every mode, converted to uint8 tensors of one size."""

from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch

from dreplica.data.images.images import ImageFiles, Images, UnreadableImageError, read_image, to_rgb
from dreplica.data.samples import SampleError
from tests.data.pictures import cut


def pixel(image: PIL.Image.Image) -> tuple[int, ...]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return rgb.getpixel((0, 0))  # type: ignore[return-value]


def test_modes_are_converted_as_documented() -> None:
    new = PIL.Image.new
    assert pixel(new("RGB", (2, 2), (1, 2, 3))) == (1, 2, 3)
    assert pixel(new("L", (2, 2), 7)) == (7, 7, 7)
    assert pixel(new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(new("CMYK", (2, 2), (255, 0, 0, 0))) == (0, 255, 255)
    # Half transparent black is half of white.
    assert pixel(new("RGBA", (2, 2), (0, 0, 0, 255))) == (0, 0, 0)
    assert pixel(new("RGBA", (2, 2), (0, 0, 0, 51))) == (204, 204, 204)
    assert pixel(new("LA", (2, 2), (9, 0))) == (255, 255, 255)


def test_16_bits_keep_black_white_and_the_middle() -> None:
    for value, expected in ((0, 0), (65535, 255), (257 * 100, 100), (257 * 100 + 128, 100), (257 * 100 + 129, 101)):
        image = PIL.Image.fromarray(numpy.full((2, 2), value, dtype=numpy.uint16))
        assert pixel(image) == (expected,) * 3
    with pytest.raises(UnreadableImageError, match="its pixels range from 70000 to 70000: convert it") as caught:
        to_rgb(PIL.Image.new("I", (2, 2), 70000))
    assert (caught.value.code, caught.value.fields) == ("pixels-not-convertible", {"low": 70000, "high": 70000})
    with pytest.raises(UnreadableImageError, match="floats"):
        to_rgb(PIL.Image.new("F", (2, 2), 0.5))


def test_transparent_palette_color_becomes_white(tmp_path: Path) -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    rgb = to_rgb(read_image(str(tmp_path / "a.png")))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ((255, 255, 255), (40, 50, 60))


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9), ("I;16", 999)])
def test_transparent_color_without_palette_becomes_white(mode: str, colour: Any, tmp_path: Path) -> None:
    image = PIL.Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 0 if mode != "RGB" else (0, 0, 0))
    image.save(tmp_path / "a.png", transparency=colour)
    rgb = to_rgb(read_image(str(tmp_path / "a.png")))
    assert (rgb.mode, rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ("RGB", (255, 255, 255), (0, 0, 0))


def test_animation_with_wrong_suffix_gives_first_frame(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (4, 4), (level, 0, 0)) for level in (200, 100, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert pixel(read_image(str(tmp_path / "a.jpg"))) == (200, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (40000, 1), (2, 90000)])
def test_extreme_aspect_ratios_take_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = PIL.Image.Image.resize

    def watched(image: PIL.Image.Image, size: Any, *args: Any, **keywords: Any) -> PIL.Image.Image:
        sizes.append(size)
        return resize(image, size, *args, **keywords)

    monkeypatch.setattr(PIL.Image.Image, "resize", watched)
    strip = PIL.Image.new("RGB", size)
    strip.paste((255, 0, 0), (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2))
    image, _ = Images([(strip, 0)], None, 32)[0]
    assert image.shape == (3, 32, 32)
    assert image[0].float().mean() > 250  # the middle is red
    assert all(max(size) <= 16 * 37 for size in sizes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    turn = PIL.Image.Transpose
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90]
    undo = [*stored, turn.TRANSVERSE, turn.ROTATE_270][orientation - 1]
    upright = cut("china", 1)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    (upright if undo is None else upright.transpose(undo)).save(tmp_path / "a.png", exif=exif)
    assert read_image(str(tmp_path / "a.png")).tobytes() == upright.tobytes()


def test_images_are_center_cropped_unless_of_the_size() -> None:
    halves = PIL.Image.new("RGB", (90, 45), (255, 0, 0))
    halves.paste((0, 0, 255), (45, 0, 90, 45))
    image, _ = Images([(halves, 0)], None, 32)[0]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    assert image[0, :, 0].eq(255).all()
    assert image[2, :, -1].eq(255).all()
    small = PIL.Image.fromarray(numpy.arange(32 * 32 * 3, dtype=numpy.uint8).reshape(32, 32, 3))
    image, _ = Images([(small, 0)], None, 32)[0]
    assert image.permute(1, 2, 0).numpy().tobytes() == small.tobytes()


def damage(kind: str, path: Path) -> None:
    cut("china", 2).save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "vanished":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("truncated", "image-damaged", "image file is truncated"),
        ("empty", "file-empty", "the file is empty"),
        ("text", "not-an-image", "it is not an image that PIL can read"),
        ("vanished", "file-missing", "the file no longer exists"),
        ("folder", "image-damaged", ".*directory"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_unreadable_file_error_names_index_and_remedy(
    kind: str, code: str, words: str, suffix: str, tmp_path: Path
) -> None:
    damage(kind, tmp_path / f"a{suffix}")
    images = Images(ImageFiles(tmp_path, ["other.jpg", f"a{suffix}"], [0, 1]), [1], 32)
    start = rf"^data.root: the sample at index 0 \(a{suffix}\) cannot be loaded: "
    with pytest.raises(SampleError, match=rf"{start}{words}.*on_error skip") as caught:
        images[0]
    assert caught.value.code == code
    assert caught.value.fields == {"key": "data.root", "index": 0, "sample": f"a{suffix}"}
