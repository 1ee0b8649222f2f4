"""Tests of augmentation, which depends only on (seed, epoch, index)."""

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dreplica.config.schema import DataConfig
from dreplica.data.images.augment import NAMES, make_augmentation, seeded_generators
from dreplica.data.images.images import Images
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import load_batches
from dreplica.data.samples import at_epoch
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.stages import rng_stage
from tests.data.pictures import cut

CPU = torch.device("cpu")
SIZE = 32
SOURCE = [(cut("flower" if number % 2 else "china", number), number % 2) for number in range(12)]


def of_all_generators(image: Tensor) -> Tensor:
    """Draw from the generators of Python, NumPy and torch, and sum over the image, which depends on threads."""
    image = functional.adjust_contrast(image, 0.5 + random.random())
    image = functional.adjust_brightness(image, 0.5 + float(numpy.random.random()))
    return v2.RandomRotation(30)(image)


def no_image(_image: Tensor) -> Any:
    return 3


def floats(image: Tensor) -> Tensor:
    return image / 255


OWN = f"{__name__}:of_all_generators"


def images(name: str | None, seed: int = 0) -> Images:
    config = DataConfig.model_validate({"augment": name})
    return Images(SOURCE, None, SIZE, make_augmentation(config, SIZE), seed)


def pixels(dataset: Images, epoch: int, indices: list[int]) -> dict[int, bytes]:
    view = dataset.at_epoch(epoch)
    return {index: view[index][0].numpy().tobytes() for index in indices}


names = st.sampled_from([*NAMES, OWN])


@settings(max_examples=30, deadline=None)
@given(names, st.integers(0, 2**32 - 1), st.integers(1, 10**6), st.permutations(range(12)), st.integers(0, 2**31))
def test_pixels_do_not_depend_on_order_or_rng_state(
    name: str, seed: int, epoch: int, order: list[int], other: int
) -> None:
    dataset = images(name, seed)
    expected = pixels(dataset, epoch, list(range(12)))
    random.seed(other)
    numpy.random.seed(other % 2**32)
    torch.manual_seed(other)
    pixels(dataset, epoch + 1, order[:3])
    assert pixels(images(name, seed), epoch, order[:5]) == {index: expected[index] for index in order[:5]}


@pytest.mark.process
@pytest.mark.parametrize("name", [*NAMES, OWN])
def test_pixels_do_not_depend_on_workers_or_threads(name: str) -> None:
    dataset = images(name, seed=3)

    def load(num_workers: int, batch_size: int) -> dict[int, bytes]:
        stream = IndexSampler(Channel(), 0).training_batches(12, batch_size, epoch=4)
        found = {}
        for batch in load_batches(at_epoch(dataset, 4), stream, CPU, num_workers, 0, 4):
            assert batch.inputs.dtype is torch.float32
            found |= {int(i): row.numpy().tobytes() for i, row in zip(batch.indices, batch.inputs, strict=True)}
        return found

    expected = load(0, 12)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with seeded_generators(0, 1, 2):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        assert load(0, 5) == expected
    finally:
        torch.set_num_threads(threads)
    assert load(1, 3) == expected
    assert load(2, 4) == expected


@pytest.mark.parametrize("name", [*NAMES, OWN])
def test_epochs_seeds_and_samples_differ(name: str) -> None:
    indices = list(range(12))
    one = pixels(images(name), 1, indices)
    assert pixels(images(name), 2, indices) != one
    assert pixels(images(name, seed=1), 1, indices) != one
    same = Images([SOURCE[0]] * 12, None, SIZE, images(name).augmentation)
    assert len(set(pixels(same, 1, indices).values())) > 1


@settings(max_examples=20, deadline=None)
@given(names, st.integers(0, 2**31))
def test_global_generators_are_restored(name: str, seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    random.gauss(0, 1), numpy.random.standard_normal(), torch.randn(3)  # each may buffer a second draw
    before = rng_stage().digest
    images(name).at_epoch(1)[seed % 12]
    assert rng_stage().digest == before


def test_generators_are_restored_after_an_exception() -> None:
    before = rng_stage().digest
    with contextlib.suppress(KeyError), seeded_generators(0, 1, 2):
        draw()
        raise KeyError
    assert rng_stage().digest == before


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(torch.rand(1))


@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 10**6), st.integers(0, 10**7)), st.integers(0, 2))
def test_generators_depend_on_seed_epoch_and_index(place: tuple[int, int, int], changed: int) -> None:
    with seeded_generators(*place):
        one = draw()
    with seeded_generators(*(value + (number == changed) for number, value in enumerate(place))):
        other = draw()
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_augmentations_do_what_their_names_say() -> None:
    small = [(cut("china", 0).resize((SIZE, SIZE)), 0)]
    original = Images(small, None, SIZE)[0][0]
    for name in (*NAMES, OWN):
        image, label = images(name).at_epoch(1)[0]
        assert (image.shape, image.dtype, label) == ((3, SIZE, SIZE), torch.uint8, 0)
    assert made_of(small, "flip", 20) == {original.numpy().tobytes(), original.flip(2).numpy().tobytes()}
    # Each window of the padded image, and of its mirror image.
    padded = torch.nn.functional.pad(original, (4, 4, 4, 4))
    windows = [
        source[:, y : y + SIZE, x : x + SIZE] for source in (padded, padded.flip(2)) for y in range(9) for x in range(9)
    ]
    assert made_of(small, "crop_flip", 3000) == {window.numpy().tobytes() for window in windows}


def made_of(source: list[Any], name: str, num: int) -> set[bytes]:
    """Return the augmented images of one image that is `num` samples of a set."""
    dataset = Images(source * num, None, SIZE, images(name).augmentation)
    return {dataset[index][0].numpy().tobytes() for index in range(num)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flips", "data.augment: there is no augmentation 'flips'. Did you mean 'flip'?"),
        (f"{__name__}:no_image", "returned int. Return an image like the argument: uint8, (3, H, W)."),
        (f"{__name__}:floats", "returned torch.float32 (3, "),
        (f"{__name__}:not_there", "has no function 'not_there'"),
    ],
)
def test_bad_augmentation_is_a_usage_error(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        images(name)[0]
    assert str(caught.value).startswith("data.augment: ")
    assert words in str(caught.value)
