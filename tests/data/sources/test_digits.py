"""Tests of scikit-learn's digits."""

from typing import Any

import torch

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate(values)


def test_digits_are_as_documented_and_reproduce() -> None:
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


def test_split_seed_changes_only_the_split() -> None:
    one, other = load_data(config()), load_data(config(split_seed=1))
    assert one.digest == other.digest
    assert not one.val[0][0].equal(other.val[0][0])
