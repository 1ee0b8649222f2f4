"""Models with an operator that adds with atomics on a GPU, in a varying order, and images to train on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreplica.config.schema import DataConfig
from dreplica.data.samples import TensorImages

INPUTS = 3 * 8 * 8


class Interpolated(nn.Module):
    """A model whose gradients of a small image are sums over a quarter of a large one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, 4 * 2 * 2)
        self.head = nn.Linear(64 * 64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        small = self.encode(inputs.flatten(1)).view(-1, 4, 2, 2)
        large = F.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
        return self.head(large.mean(1).flatten(1))


class Gathered(nn.Module):
    """A model with a few sums of thousands of terms."""

    def __init__(self, num_classes: int, width: int = 8192, num_sums: int = 8) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, width)
        self.head = nn.Linear(num_sums, num_classes)
        self.num_sums = num_sums
        self.register_buffer("places", torch.arange(width) % num_sums)

    def forward(self, inputs: Tensor) -> Tensor:
        terms = self.encode(inputs.flatten(1))
        sums = terms.new_zeros(len(terms), self.num_sums).index_add(1, self.places, terms)
        return self.head(sums)


class Both(nn.Module):
    """Both models in one. The one that adds in its forward pass is second."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.interpolated, self.gathered = Interpolated(num_classes), Gathered(num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.interpolated(inputs) + self.gathered(inputs)


def interpolated(num_classes: int) -> nn.Module:
    """Return a model, as `model.factory` does."""
    return Interpolated(num_classes)


def gathered(num_classes: int) -> nn.Module:
    """Return a model, as `model.factory` does."""
    return Gathered(num_classes)


def both(num_classes: int) -> nn.Module:
    """Return a model, as `model.factory` does."""
    return Both(num_classes)


def noise(_: DataConfig, num_train: int = 160, size: int = 64) -> tuple[TensorImages, TensorImages, int]:
    """Return uint8 images, as a `data.name` does."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_train + 32, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (num_train + 32,), generator=generator)
    return TensorImages(images[:num_train], labels[:num_train]), TensorImages(images[num_train:], labels[num_train:]), 5


def noise_of_imagenets_size(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Return 30 batches of 64, for a benchmark."""
    return noise(config, num_train=1920, size=224)
