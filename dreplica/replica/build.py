"""Builds one replica from scratch, under its own seed."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy

from dreplica.config.components import (
    build_criterion,
    build_optimizer,
    build_scheduler,
    check_criterion,
    check_optimizer,
)
from dreplica.config.imports import call_function
from dreplica.config.messages import nearest
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.replica.pretrained import load_pretrained
from dreplica.replica.published import arguments_for, cached, find_published, is_file
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.tensors import overwrite

if TYPE_CHECKING:
    from dreplica.config.schema import RunConfig
from dreplica.config.schema import ModelConfig


def build_replica(config: "RunConfig", num_classes: int, device: torch.device) -> Replica:
    """A replica on `device`, built under the global generators as they are: seed them first.

    `num_classes`: the data set's. Draws happen on the CPU, so the build does not depend on the device. Raises
    UsageError for what the config asks and torch cannot build, or cannot train on this data set.
    """
    num_outputs = _num_outputs(config, num_classes)
    if config.replica.factory is not None:
        replica = call_function("replica.factory", config.replica.factory, config, num_outputs, device)
        _check_factory(config.replica.factory, replica, device)
        return replica
    model = build_model(config.model, num_outputs)
    criterion = build_criterion(config.criterion)
    check_criterion(criterion, num_outputs)
    model, criterion = model.to(device), criterion.to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    compile_model(model, config.model.compile, device)
    with _naming(f"optim: {config.optim.name} cannot train this model"):
        optimizer = build_optimizer(config.optim, model)
    check_optimizer("optim", optimizer, device)
    with _naming(f"schedule: {config.schedule.name} cannot drive {config.optim.name}"):
        scheduler = build_scheduler(config.schedule, optimizer)
    return Replica(model, criterion, optimizer, scheduler, scheduler_per=config.schedule.per)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The model with a fresh head for `num_classes`, on the CPU.

    With `weights`: every layer is drawn as it is from scratch, then all but the head is loaded, which draws nothing,
    and then the head is drawn again, as nn.Linear and nn.Conv2d draw theirs by default (a ViT's own is all zeros: one
    head for all seeds). So head and generators after it depend on the seed, the model and the number of classes alone.
    A head from a `factory` stays as that drew it.
    """
    if config.factory is not None:
        model = call_function("model.factory", config.factory, num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model.factory: {config.factory!r} returned {type(model).__name__}. Return an nn.Module.")
        _check_initialized("model.factory", model)
        if config.weights is not None:
            if not is_file(config.weights):
                raise UsageError(
                    f"model.weights: {config.weights!r} is a name of torchvision's, and the model is that of "
                    "model.factory. Give a file, or load torchvision's weights in your function."
                )
            load_pretrained(model, config.weights, None, num_classes)
        return model
    names = torchvision.models.list_models(module=torchvision.models)
    if config.name not in names:
        raise UsageError(
            f"model.name: torchvision has no classification model {config.name!r}. {nearest(config.name, names)}"
        )
    published = None if config.weights is None else find_published(config.name, config.weights)
    arguments = {**_ARGUMENTS.get(config.name, {}), **arguments_for(config.name, published)}
    model = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **arguments)
    if config.weights is not None:
        head = load_pretrained(model, config.weights, published, num_classes)
        assert head is not None, f"{config.name} of this torchvision has no linear or convolutional head"
        model.get_submodule(head).reset_parameters()
    return model


_ARGUMENTS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
"""Without auxiliary heads, with which these two would return several logits in training."""


def weights_digest(config: "RunConfig") -> str | None:
    """32 hex digits over the file that the replica just built has its weights from; None if there is none."""
    weights = config.model.weights
    if weights is None or config.replica.factory is not None:
        return None
    published = None if is_file(weights) else find_published(config.model.name, weights)
    with (Path(weights).expanduser() if published is None else cached(published)).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def broadcast_state(model: nn.Module, channel: Channel, with_rng: bool) -> None:
    """Gives every replica rank 0's parameters and buffers, and with `with_rng` rank 0's generators. A collective.

    Where replicas do not have the same tensors nothing is sent: the comparison of the build names what differs.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    described = channel.gather([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors])
    if any(row != described[0] for row in described):
        return
    with torch.no_grad():
        for _, tensor in tensors:
            own = tensor.detach().cpu()
            dense = own.layout is torch.strided
            overwrite(tensor, channel.broadcast(own.contiguous()) if dense else channel.gather(own)[0])
    if with_rng:
        set_rng_state(channel.gather(get_rng_state())[0])


def compile_model(model: nn.Module, backend: bool | str, device: torch.device) -> None:
    """Compiles `model` in place, as `model.compile` asks: parameters, names and the state_dict's keys stay.

    Nothing is compiled before the first forward pass. Raises UsageError if there is no C++ compiler and it takes one.
    """
    if backend is False:
        return
    name = "inductor" if backend is True else backend
    if name == "inductor" and device.type == "cpu":
        _check_cpp_compiler()
    # Compiled for each batch size by itself: by default, the second size makes torch compile for any, which may round
    # otherwise, and a replay of the first steps would run that code instead of what they ran.
    model.compile(backend=name, dynamic=False)


def _check_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "model.compile: the backend 'inductor' writes C++ for the CPU, and there is no working C++ compiler. "
            "Install one (apt-get install g++), name yours in the environment variable CXX, or take 'aot_eager'."
        ) from None


def _num_outputs(config: "RunConfig", num_classes: int) -> int:
    """`model.num_classes`, by default the data set's. Raises UsageError if labels would fall outside the logits."""
    wanted = config.model.num_classes
    if wanted is not None and wanted < num_classes:
        raise UsageError(
            f"model.num_classes: {wanted} is fewer than the {num_classes} classes of the data set "
            f"{config.data.name!r} (data.name). Set it to null to take the data set's, or to {num_classes} or more."
        )
    return wanted or num_classes


def _check_factory(path: str, replica: object, device: torch.device) -> None:
    """Raises UsageError for what a `replica.factory` returned and the trainer cannot train."""
    if not isinstance(replica, Replica):
        raise UsageError(
            f"replica.factory: {path!r} returned {type(replica).__name__}. "
            "Return dreplica.Replica(model=, criterion=, optimizer=, scheduler=)."
        )
    for name, kind, hint in _PARTS:
        part = getattr(replica, name)
        if not isinstance(part, kind):
            found = "a function" if inspect.isfunction(part) else "None" if part is None else type(part).__name__
            raise UsageError(f"replica.factory: the {name} that {path!r} returned is {found}. {hint}")
    check_optimizer("replica.factory", replica.optimizer, device)
    _check_initialized("replica.factory", replica.model)
    scheduler = replica.scheduler
    if scheduler is not None and not (hasattr(scheduler, "step") and hasattr(scheduler, "state_dict")):
        raise UsageError(
            f"replica.factory: the scheduler that {path!r} returned is {type(scheduler).__name__}, which has no step "
            "or no state_dict. Return one of torch.optim.lr_scheduler's, or None."
        )
    if replica.scheduler_per not in ("epoch", "step"):
        raise UsageError(
            f"replica.factory: the replica that {path!r} returned has scheduler_per={replica.scheduler_per!r}. "
            "Say 'epoch' or 'step'."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(
            f"replica.factory: the scheduler that {path!r} returned is a ReduceLROnPlateau, which waits for a metric; "
            "schedules are stepped without one. Use another, CosineAnnealingLR for instance."
        )


_PARTS: tuple[tuple[str, type, str], ...] = (
    ("model", nn.Module, "Return an nn.Module."),
    ("criterion", nn.Module, "Return an nn.Module, torch.nn.CrossEntropyLoss() for instance: it may hold state, too."),
    ("optimizer", torch.optim.Optimizer, "Return one of torch.optim's over the model's parameters."),
)
"""What a `replica.factory` has to return, and the hint where it does not."""


def _check_initialized(key: str, model: nn.Module) -> None:
    """Raises UsageError for lazy parameters: they have no values to compare, and their draws would come later."""
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{key}: {lazy[0]!r} of the model is not initialized yet (a lazy module). Run a dummy batch through the "
            "model in your function, before its optimizer is made."
        )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns what torch objects to into a UsageError that begins with `what`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{what}: {error}") from None
