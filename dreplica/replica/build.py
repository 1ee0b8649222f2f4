"""Builds one replica from scratch, under its own seed."""

from typing import TYPE_CHECKING, Literal

import torch
import torchvision
from pydantic import Field
from torch import nn

from dreplica.errors import UsageError
from dreplica.replica.components import build_criterion, build_optimizer, build_scheduler
from dreplica.replica.replica import Replica
from dreplica.replica.rng import get_rng_state, set_rng_state
from dreplica.section import Section, import_function, nearest
from dreplica.world.channel import Channel

if TYPE_CHECKING:
    from dreplica.config import RunConfig


class ModelConfig(Section):
    """The model."""

    name: str = "resnet18"
    """Any torchvision classification model."""
    factory: str | None = None
    """`package.module:function` to use instead of `name`: called with `num_classes=`, returns an nn.Module."""
    num_classes: int | None = Field(None, ge=2)
    """Outputs of the model; null: the data set's number of classes."""
    init: Literal["scratch", "broadcast"] = "scratch"
    """`scratch`: every replica's own build; `broadcast`: rank 0's state is sent to all after the build."""
    channels_last: bool = False
    """Keep weights and inputs in channels_last memory format."""


class ReplicaConfig(Section):
    """The whole replica from one function of yours."""

    factory: str | None = None
    """`package.module:function`, called as `function(config, num_classes, device)` under the replica's seed, returns
    `dreplica.Replica(model=, criterion=, optimizer=, scheduler=)`; null: built from the sections."""


def build_replica(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """A replica on `device`, built under the global generators as they are: seed them first.

    Draws happen on the CPU, so the build does not depend on the device. Raises UsageError for what the config asks and
    torch cannot build.
    """
    num_classes = config.model.num_classes or num_classes
    if config.replica.factory is not None:
        replica = import_function("replica.factory", config.replica.factory)(config, num_classes, device)
        if not isinstance(replica, Replica):
            raise UsageError(
                f"replica.factory: {config.replica.factory!r} returned {type(replica).__name__}. "
                "Return dreplica.Replica(model=, criterion=, optimizer=, scheduler=)."
            )
        return replica
    model = build_model(config.model, num_classes)
    model = model.to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    criterion = build_criterion(config.criterion).to(device)
    try:
        optimizer = build_optimizer(config.optim, model)
        scheduler = build_scheduler(config.schedule, optimizer)
    except (ValueError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"optim: {config.optim.name} cannot train this model: {error}") from None
    return Replica(model, criterion, optimizer, scheduler)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The model with a fresh head for `num_classes`, on the CPU."""
    if config.factory is not None:
        model = import_function("model.factory", config.factory)(num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model.factory: {config.factory!r} returned {type(model).__name__}. Return an nn.Module.")
        return model
    names = torchvision.models.list_models(module=torchvision.models)
    if config.name not in names:
        raise UsageError(
            f"model.name: torchvision has no classification model {config.name!r}. {nearest(config.name, names)}"
        )
    return torchvision.models.get_model(config.name, weights=None, num_classes=num_classes)


def broadcast_state(model: nn.Module, channel: Channel, with_rng: bool) -> None:
    """Gives every replica rank 0's parameters and buffers, and with `with_rng` rank 0's generators. A collective."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            sent = channel.broadcast(tensor.detach().cpu().contiguous())
            tensor.copy_(sent)
    if with_rng:
        set_rng_state(channel.gather(get_rng_state())[0])
