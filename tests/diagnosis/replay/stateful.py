"""Models, losses and data with state that no state_dict holds, or in tensors of unusual kinds; for test_replay_jobs."""

import os
import random

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreplica import Replica
from dreplica.config.schema import DataConfig, RunConfig
from dreplica.data.samples import TensorImages
from tests.fixtures import tiny_images, tiny_model


def rank() -> int:
    return int(os.environ["RANK"])


class Counting(nn.Module):
    """`tiny_model` as `body`; `calls` counts the training-mode forwards."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = tiny_model(num_classes)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        return self.body(images)


class OnceOnReplica1(Counting):
    """A branch that one replica takes once."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * 1.001 if rank() == 1 and self.calls == 4 else logits


class ResizedOnReplica1(Counting):
    """A buffer that one replica replaces once by another of another size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        if rank() == 1 and self.calls == 3:
            self.seen = torch.zeros(4)
        return super().forward(images)


class ByTheCount(Counting):
    """The count goes into the logits, on all replicas alike."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + 0.01 * self.calls)


class OwnGenerators(Counting):
    """A model that draws from private, equally seeded generators and tracks its logits outside its buffers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.random, self.numpy = random.Random(1), [numpy.random.default_rng(1)]
        self.torch, self.mean = torch.Generator().manual_seed(1), torch.zeros(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        noise = self.random.random() + self.numpy[0].random() + torch.rand(1, generator=self.torch)
        logits = super().forward(images) + 0.01 * noise + 0.1 * self.mean
        self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
        return logits


class DrawsAlways(Counting):
    """Draws in evaluations, too, and counts all its calls."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.all_calls = 0
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.all_calls += 1
        self.samples = self.samples + len(images)
        noise = random.random() + torch.rand(1) + 0.01 * self.all_calls + 0.001 * self.samples
        return super().forward(images) + 0.01 * noise


class Freezing(Counting):
    """Freezes its BatchNorm in mid-epoch."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.calls == 2:
            self.body[1].eval()
        return super().forward(images)


class BufferOfWeights(Counting):
    """A buffer that becomes a view of a weight in the first forward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("head", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.head = self.body[5].weight.data
        return super().forward(images)


class Expanded(Counting):
    """A buffer all of whose elements are one number in memory."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("mask", torch.ones(1).expand(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.mask


class OddDtypes(Counting):
    """Buffers of dtypes that torch can neither pickle nor broadcast."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("f8", torch.randn(6).to(torch.float8_e4m3fn))
        self.register_buffer("u16", torch.arange(6).to(torch.uint16))
        self.register_buffer("sparse", torch.eye(num_classes).to_sparse())

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return (
            logits
            + logits * self.f8[0].float()
            + self.u16.float().mean()
            + torch.sparse.mm(self.sparse, logits.t()).t()
        )


def once_on_replica_1(num_classes: int) -> nn.Module:
    return OnceOnReplica1(num_classes)


def resized_on_replica_1(num_classes: int) -> nn.Module:
    return ResizedOnReplica1(num_classes)


def by_the_count(num_classes: int) -> nn.Module:
    return ByTheCount(num_classes)


def own_generators(num_classes: int) -> nn.Module:
    return OwnGenerators(num_classes)


def draws_always(num_classes: int) -> nn.Module:
    return DrawsAlways(num_classes)


def freezing(num_classes: int) -> nn.Module:
    return Freezing(num_classes)


def buffer_of_weights(num_classes: int) -> nn.Module:
    return BufferOfWeights(num_classes)


def expanded(num_classes: int) -> nn.Module:
    return Expanded(num_classes)


def odd_dtypes(num_classes: int) -> nn.Module:
    return OddDtypes(num_classes)


class CenterLoss(nn.Module):
    """Cross-entropy with a weight to learn and a centre to follow for each class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.register_buffer("centers", torch.zeros(num_classes, num_classes))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.centers.index_add_(0, labels, logits.detach(), alpha=0.1)
        distance = (logits - self.centers[labels]).square().mean()
        return F.cross_entropy(logits * self.scale, labels) + 0.01 * distance


def with_center_loss(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model, criterion = tiny_model(num_classes), CenterLoss(num_classes)
    groups = [{"params": list(model.parameters())}, {"params": list(criterion.parameters()), "lr": 0.01}]
    return Replica(model, criterion, torch.optim.AdamW(groups, lr=1e-3))


class Restless(TensorImages):
    """Noise from generators of the data set's own, and of its transform's."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        self.random, self.transform, self.seen = numpy.random.default_rng(1), Jitter(), [0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        self.seen[0] += 1
        return self.transform(image) + 0.01 * float(self.random.random()) + 0.001 * self.seen[0], label


class Jitter:
    def __init__(self) -> None:
        self.random = random.Random(1)

    def __call__(self, image: Tensor) -> Tensor:
        return image * (1 + 0.01 * self.random.random())


def restless(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    train, val, num_classes = tiny_images(config)
    return Restless(train.images, train.labels), val, num_classes
