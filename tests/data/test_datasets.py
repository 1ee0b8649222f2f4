"""Data sets by name."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "data.name: there is no data set 'digit'. Did you mean 'digits'?"),
        ("cifar", "data.name: there is no data set 'cifar'."),
        (f"{__name__}:returns_nothing", "returned NoneType. Return (training set, validation set, number of classes)"),
        (f"{__name__}:empty_validation", "the validation set of"),
        (f"{__name__}:no_such", "has no function 'no_such'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
    ],
)
def test_what_is_no_data_set(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(config(name=name))
    assert str(caught.value).startswith("data.name: ")
    assert words in str(caught.value)


def test_a_data_set_of_ones_own() -> None:
    data = load_data(config(name="tests.fixtures:tiny_images"))
    assert (len(data.train), len(data.val), data.num_classes) == (80, 40, 5)  # type: ignore[arg-type]
