"""Models, data and replicas with one known fault each, for the jobs of test_verdicts."""

import copy
import os

import numpy
import torch
from torch import Tensor, nn

from dreplica import Replica
from dreplica.config.schema import DataConfig, RunConfig
from dreplica.data.samples import TensorImages
from tests.fixtures import tiny_images, tiny_model

schedulers = torch.optim.lr_scheduler


def rank() -> int:
    return int(os.environ["RANK"])


def good_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, schedulers.StepLR(optimizer, 1))


def copied_optimizer(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = good_replica(config, num_classes, device)
    optimizer = copy.deepcopy(replica.optimizer)
    return Replica(replica.model, replica.criterion, optimizer, schedulers.StepLR(optimizer, 1))


def copied_scheduler(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = good_replica(config, num_classes, device)
    replica.scheduler = copy.deepcopy(replica.scheduler)
    return replica


def forgotten_head(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model[:5].parameters(), lr=0.1))


def shared_storage_on_rank_1(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = good_replica(config, num_classes, device)
    if rank() == 1:
        replica.model[1].running_var.set_(replica.model[1].running_mean)
    return replica


def one_more_draw_on_rank_1(num_classes: int) -> nn.Module:
    if rank() == 1:
        torch.rand(1)
    return tiny_model(num_classes)


def reseeded_from_the_os(num_classes: int) -> nn.Module:
    torch.seed()
    return tiny_model(num_classes)


def drawn_elsewhere(num_classes: int) -> nn.Module:
    """Initialize weights from a private, unseeded generator; the global generators are unchanged."""
    model = tiny_model(num_classes)
    noise = numpy.random.default_rng().standard_normal(model[5].weight.shape)
    with torch.no_grad():
        model[5].weight.copy_(torch.from_numpy(noise))
    return model


def scaled_by_rank(num_classes: int) -> nn.Module:
    """No random number: weights that depend on the rank."""
    model = tiny_model(num_classes)
    with torch.no_grad():
        model[5].weight.mul_(1 + rank())
    return model


def noisy_on_rank_1(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    train, val, num_classes = tiny_images(config)
    if rank() == 1:
        train.images[0, 0, 0, 0] += 1e-6
    return train, val, num_classes


def other_labels_to_validate_on_rank_1(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    train, val, num_classes = tiny_images(config)
    labels = (val.labels + 1) % num_classes if rank() == 1 else val.labels
    return train, TensorImages(val.images, labels), num_classes


def interrupted(num_classes: int) -> nn.Module:
    raise KeyboardInterrupt


class OtherEvaluation(nn.Sequential):
    """Predicts otherwise on rank 1, but only in eval mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        return logits if self.training or rank() == 0 else logits + 1e-3


def other_evaluation(num_classes: int) -> nn.Module:
    return OtherEvaluation(*tiny_model(num_classes))
