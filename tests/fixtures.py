"""Small models and data for the configs of jobs under test."""

import torch
from torch import nn

from dreplica.config.schema import DataConfig
from dreplica.data.samples import TensorImages

SMALL = (
    "--data.name=tests.fixtures:tiny_images",
    "--model.factory=tests.fixtures:tiny_model",
    "--data.batch_size=16",
    "--train.epochs=2",
    "--schedule={}",
    "--optim.lr=0.05",
)
"""Arguments of a job that trains in about a second."""


def merged(*arguments: str) -> list[str]:
    """Return arguments of which a later one replaces an earlier one with the same key, or with a key of its section.

    A `--replica.factory` also replaces `--model.factory` and `--optim.KEY`, which the tests' functions do not read.
    """
    given: dict[str, str] = {}
    for token in arguments:
        key = token.split("=", 1)[0]
        replaced = ("--model.factory", "--optim.") if key == "--replica.factory" else (f"{key}.",)
        given = {other: value for other, value in given.items() if not other.startswith(replaced)}
        given[key] = token
    return list(given.values())


def tiny_images(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Return 80 training and 40 validation images of five classes, 8x8 pixels each."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 3, 8, 8, generator=generator)
    labels = torch.arange(120) % 5
    images = centers[labels] + 0.5 * torch.randn(120, 3, 8, 8, generator=generator)
    return TensorImages(images[:80], labels[:80]), TensorImages(images[80:], labels[80:]), 5


def tiny_model(num_classes: int) -> nn.Module:
    """Return a model with a convolution, batch norm, dropout and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 8 * 8, num_classes),
    )


def as_it_is(image: torch.Tensor) -> torch.Tensor:
    """Return an image without a change, as an augmentation."""
    return image
