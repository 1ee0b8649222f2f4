"""Ways to build a replica, most of them wrong, for `replica.factory`.

Each takes (config, num_classes, device), builds `model.factory` and `optim` of the config under the replica's seed, and
differs from the others in one thing.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from dreplica.config.components import build_criterion, build_optimizer
from dreplica.distributed.process_group import env_rank
from dreplica.replica.build import build_model
from dreplica.state.replica import Replica

if TYPE_CHECKING:
    from dreplica.config.schema import RunConfig


def deepcopied_optimizer(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copy model and optimizer separately: the copied optimizer holds neither model's parameters.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, copy.deepcopy(original), copy.deepcopy(optimizer))


def deepcopied_model(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copy the model only, so that the optimizer still trains the original.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, copy.deepcopy(original), optimizer)


def deepcopied_together(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copy both in one call, which is right: the copied optimizer holds the copied model.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, *copy.deepcopy((original, optimizer)))


def head_replaced_late(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Create the optimizer before the head is replaced, so that no optimizer trains the new head.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, 1000, device)
    optimizer = build_optimizer(config.optim, model)
    _replace_head(model, num_classes)
    return _replica(config, model, optimizer)


def head_left_out(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Pass every layer except the head to the optimizer.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model[:-1]))


def deepcopied_scheduler(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copy the scheduler, which then drives a copy of the optimizer.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, model)
    scheduler = copy.deepcopy(StepLR(optimizer, step_size=1, gamma=0.1))
    return _replica(config, model, optimizer, scheduler)


def shared_storage(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Initialize BatchNorm's bias from the convolution's without copying it: two parameters, one memory.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    model[1].bias = nn.Parameter(model.get_parameter("0.bias").detach())
    return _replica(config, model, build_optimizer(config.optim, model))


def unseeded_head(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Seed torch from the operating system before the head is drawn.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    torch.seed()
    _replace_head(model, num_classes)
    return _replica(config, model, build_optimizer(config.optim, model))


def one_seed_for_two_builds(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Build another model first on replica 1, under the same seed, so that the model gets later numbers.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    if env_rank() == 1:
        _model(config, num_classes, device)
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


def seed_for_each_build(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Seed before each of two builds, which is right.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    seed = torch.initial_seed()
    if env_rank() == 1:
        _model(config, num_classes, device)
    torch.manual_seed(seed)
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


def extra_layer(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Draw an unused layer after the model on replica 1: weights agree, but dropout masks differ.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    if env_rank() == 1:
        nn.Linear(4, 4)
    return _replica(config, model, build_optimizer(config.optim, model))


def probed_loader(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Read a batch first on replica 1: a DataLoader draws from the global generator, shuffled or not.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    if env_rank() == 1:
        next(iter(DataLoader(torch.zeros(4, 3))))  # type: ignore[arg-type]  # a tensor serves as a data set
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


def reversed_parameters(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Reverse the order of the optimizer's parameters on replica 1, as the order of a set may.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, model)
    if env_rank() == 1:
        optimizer.param_groups[0]["params"].reverse()
    return _replica(config, model, optimizer)


def learning_rate_of_rank(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Halve the learning rate on replica 1, as a value from the environment may.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, model)
    if env_rank() == 1:
        optimizer.param_groups[0]["lr"] *= 0.5
    return _replica(config, model, optimizer)


def noise_seeded_by_rank(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Add noise to the inputs from a generator that is seeded with the rank.

    Args:
        config: The run's config.
        num_classes: Number of outputs of the model.
        device: The device to build on.
    """
    model = nn.Sequential(Noise(seed=env_rank()), *_model(config, num_classes, device))
    return _replica(config, model, build_optimizer(config.optim, model))


class Noise(nn.Module):
    """Add normal noise in training mode, from a private generator.

    Args:
        seed: The seed of the generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs with noise, of the same shape."""
        if not self.training:
            return inputs
        noise = torch.randn(inputs.shape, generator=self.generator, device="cpu")
        return inputs + 0.1 * noise.to(inputs.device)


def _model(config: "RunConfig", num_classes: int, device: torch.device) -> nn.Sequential:
    model = build_model(config.model, num_classes)
    assert isinstance(model, nn.Sequential), (
        "these builds reach into the layers of dreplica.commands.cases.samples.models:tiny_cnn"
    )
    return model.to(device)


def _replace_head(model: nn.Sequential, num_classes: int) -> None:
    old = model[-1]
    assert isinstance(old, nn.Linear)
    model[-1] = nn.Linear(old.in_features, num_classes).to(old.weight.device)


def _replica(config: "RunConfig", model: nn.Module, optimizer: Optimizer, scheduler: object = None) -> Replica:
    return Replica(model, build_criterion(config.criterion), optimizer, scheduler)
