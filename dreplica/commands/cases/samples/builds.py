"""Ways to build a replica, most of them wrong; for `replica.factory`.

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
    """Copies model and optimizer, each by itself: the copied optimizer's parameters belong to neither model."""
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, copy.deepcopy(original), copy.deepcopy(optimizer))


def deepcopied_model(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copies the model only: the optimizer goes on training the original."""
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, copy.deepcopy(original), optimizer)


def deepcopied_together(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copies both in one call, which is right: the copy of the optimizer holds the copy of the model's parameters."""
    original = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, original)
    return _replica(config, *copy.deepcopy((original, optimizer)))


def head_replaced_late(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Makes the optimizer before the head is replaced: it holds the old head, and nobody trains the new one."""
    model = _model(config, 1000, device)
    optimizer = build_optimizer(config.optim, model)
    _replace_head(model, num_classes)
    return _replica(config, model, optimizer)


def head_left_out(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Gives the optimizer every layer but the head."""
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model[:-1]))


def deepcopied_scheduler(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Copies the scheduler: the copy drives a copy of the optimizer, and the real one's learning rate never changes."""
    model = _model(config, num_classes, device)
    optimizer = build_optimizer(config.optim, model)
    scheduler = copy.deepcopy(StepLR(optimizer, step_size=1, gamma=0.1))
    return _replica(config, model, optimizer, scheduler)


def shared_storage(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Starts BatchNorm's bias from the convolution's without copying it: two parameters, one memory."""
    model = _model(config, num_classes, device)
    model[1].bias = nn.Parameter(model.get_parameter("0.bias").detach())
    return _replica(config, model, build_optimizer(config.optim, model))


def unseeded_head(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Seeds torch from the operating system before the head is drawn, "to be on the safe side"."""
    model = _model(config, num_classes, device)
    torch.seed()
    _replace_head(model, num_classes)
    return _replica(config, model, build_optimizer(config.optim, model))


def one_seed_for_two_builds(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Replica 1 builds a twin first, under the same seed: its own model gets the numbers that come after."""
    if env_rank() == 1:
        _model(config, num_classes, device)
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


def seed_for_each_build(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """As `one_seed_for_two_builds`, but seeds before each build, which is right."""
    seed = torch.initial_seed()
    if env_rank() == 1:
        _model(config, num_classes, device)
    torch.manual_seed(seed)
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


def extra_layer(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Replica 1 draws a layer that it throws away, after the model: equal weights, but dropout's masks will differ."""
    model = _model(config, num_classes, device)
    if env_rank() == 1:
        nn.Linear(4, 4)
    return _replica(config, model, build_optimizer(config.optim, model))


def probed_loader(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """Replica 1 looks at a batch first. A DataLoader draws a base seed from the global generator, unshuffled or not."""
    if env_rank() == 1:
        next(iter(DataLoader(torch.zeros(4, 3))))  # type: ignore[arg-type]  # a tensor serves as a data set
    model = _model(config, num_classes, device)
    return _replica(config, model, build_optimizer(config.optim, model))


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
