"""Data sets by name."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from dreplica.data.datasets import DataConfig, TensorImages, load_data, split_indices
from dreplica.errors import UsageError
from tests.fixtures import tiny_images


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate(values)


def test_digits_are_what_the_docstring_says_the_same_every_time() -> None:
    data = load_data(config())
    assert (len(data.train), len(data.val), data.num_classes) == (1438, 359, 10)  # type: ignore[arg-type]
    image, label = data.train[0]
    assert (image.shape, image.dtype, type(label)) == ((3, 32, 32), torch.float32, int)
    assert image[0].equal(image[1])
    images = torch.stack([data.train[i][0] for i in range(1438)])
    assert abs(images.mean()) < 0.01
    assert 0.8 < images.std() < 0.9
    again = load_data(config())
    assert again.digest == data.digest
    assert again.train[0][0].numpy().tobytes() == image.numpy().tobytes()


def test_another_split_seed_is_another_split_of_the_same_data() -> None:
    one, other = load_data(config()), load_data(config(split_seed=1))
    assert one.digest == other.digest
    assert not one.val[0][0].equal(other.val[0][0])


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_gives_every_sample_to_one_side(num_samples: int, fraction: float, seed: int) -> None:
    num_val = round(num_samples * fraction)
    if not 0 < num_val < num_samples:
        with pytest.raises(UsageError, match=r"^data\.val_fraction: "):
            split_indices(num_samples, fraction, seed)
        return
    train, val = split_indices(num_samples, fraction, seed)
    assert len(val) == num_val
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(num_samples))
    assert split_indices(num_samples, fraction, seed)[1].equal(val)


def returns_nothing(_config: DataConfig) -> None:
    return None


def empty_validation(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    train, _, num_classes = tiny_images(config)
    return train, TensorImages(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)), num_classes


def numbers(_config: DataConfig) -> tuple[int, int, int]:
    return 1, 2, 3


def takes_nothing() -> None:
    return None


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(3, 8, 8), 0

    def __len__(self) -> int:
        return 1


def streams(_config: DataConfig) -> tuple[Stream, Stream, int]:
    return Stream(), Stream(), 5


def of_classes(num_classes: Any) -> Any:
    return lambda config: (*tiny_images(config)[:2], num_classes)


classes_none, classes_text, classes_zero, classes_one = map(of_classes, [None, "five", 0, 1])


def of_samples(sample: Any) -> Any:
    return lambda _config: ([sample] * 3, [sample] * 3, 5)


dicts, texts, threes, objects, bare = map(
    of_samples,
    [
        {"x": torch.zeros(2), "y": 0},
        (torch.zeros(2), "cat"),
        (torch.zeros(2), 1, 2),
        (object(), 1),
        torch.zeros(2, 2),
    ],
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{__name__}:numbers", "the training set of"),
        (f"{__name__}:takes_nothing", "cannot be called with (a value)"),
        (f"{__name__}:streams", "is Stream, which cannot be read by index"),
        (f"{__name__}:classes_none", "returned null as the number of classes"),
        (f"{__name__}:classes_text", "returned 'five' as the number of classes"),
        (f"{__name__}:classes_zero", "returned 0 as the number of classes"),
        (f"{__name__}:classes_one", "returned 1 as the number of classes"),
        (f"{__name__}:dicts", "is dict. Let it be (input, label)"),
        (f"{__name__}:texts", "is (Tensor, str)."),
        (f"{__name__}:threes", "is (Tensor, int, int)."),
        (f"{__name__}:objects", "is (object, int)."),
        (f"{__name__}:bare", "is Tensor."),
        ("digit", "data.name: there is no data set 'digit'. Did you mean 'digits'?"),
        ("cifar", "data.name: there is no data set 'cifar'."),
        (f"{__name__}:returns_nothing", "returned NoneType. Return (training set, validation set, number of classes)"),
        (f"{__name__}:empty_validation", "the validation set of"),
        (f"{__name__}:no_such", "has no function 'no_such'"),
        ("no_such_module:f", "no module named 'no_such_module'"),
    ],
)
def test_what_is_no_data_set(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(config(name=name))
    assert str(caught.value).startswith("data.name: ")
    assert words in str(caught.value)


arrays, one_hots = map(
    of_samples,
    [
        (numpy.zeros((9, 8, 3), dtype=numpy.uint8), 1),
        (torch.zeros(3, 9, 8, dtype=torch.uint8), torch.tensor([0, 1])),
    ],
)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("arrays", "(ndarray, int)"),
        ("one_hots", "(Tensor, Tensor)"),
        ("threes", "(Tensor, int, int)"),
        ("dicts", "dict"),
        ("texts", "(Tensor, str)"),
    ],
)
def test_what_is_no_image_is_told_before_it_is_resized(name: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(config(name=f"{__name__}:{name}", image_size=16))
    assert str(caught.value) == (
        f"data.name: the first sample of the training set of '{__name__}:{name}' is {found}. Let it be (input, label), "
        "a PIL image, or a tensor of bytes (torch.uint8, 3 x H x W), and an int."
    )


class Named(TensorImages):
    """Keeps names of classes under a name where others keep labels."""

    targets = ("cat", "dog") * 40

    def __init__(self, whole: TensorImages) -> None:
        self.images, self.classes = whole.images, whole.labels

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.classes[index])


def named(config: DataConfig) -> Any:
    train, val, num_classes = tiny_images(config)
    return Named(train), val, num_classes


def test_labels_that_are_no_numbers_are_looked_at_only_where_they_are_needed() -> None:
    assert len(load_data(config(name=f"{__name__}:named")).train) == 80  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^data.sample_weights: 'balanced' needs .* 'targets' .* begins with 'cat'"):
        load_data(config(name=f"{__name__}:named", sample_weights="balanced"))


def damaged_first(_config: DataConfig) -> Any:
    class Damaged(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise OSError("damaged")
            return super().__getitem__(index)

    pairs = [(torch.zeros(3, 9, 8, dtype=torch.uint8), 1)] * 3
    return Damaged(pairs), pairs, 2


def test_the_size_is_that_of_the_first_image_that_can_be_loaded() -> None:
    data = load_data(config(name=f"{__name__}:damaged_first", augment="flip"))
    assert data.train[1][0].shape == (3, 8, 8)


def test_a_data_set_of_ones_own() -> None:
    data = load_data(config(name="tests.fixtures:tiny_images"))
    assert (len(data.train), len(data.val), data.num_classes) == (80, 40, 5)  # type: ignore[arg-type]
