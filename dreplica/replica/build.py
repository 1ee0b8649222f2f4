"""Building one replica from scratch, under its own seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
import xxhash
from torch import nn

from dreplica.config.components import (
    build_criterion,
    build_optimizer,
    build_scheduler,
    check_criterion,
    check_optimizer,
)
from dreplica.config.imports import call_function
from dreplica.config.messages import nearest
from dreplica.config.reads import Reads
from dreplica.config.schema import ModelConfig, RunConfig
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.replica.factory_checks import check_factory, check_initialized, check_read, factory_error
from dreplica.replica.pretrained import load_pretrained
from dreplica.replica.published import builder_arguments, cache_path, find_published, is_file
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.tensors import overwrite


def build_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """Build a replica on `device` under the global generators' current state.

    Seed the generators first. Draws happen on the CPU, so the build does not depend on the device.

    Args:
        config: The replica's config, its overrides merged in.
        num_classes: Number of classes of the data set.
        device: The device to train on.

    Returns:
        The replica, without an fp16 scaler, which the trainer adds.

    Raises:
        UsageError: If torch cannot build what the config asks for, or cannot train it on this data set.
    """
    num_outputs = _num_outputs(config, num_classes)
    if config.replica.factory is not None:
        reads = Reads()
        replica = call_function("replica.factory", config.replica.factory, reads.of(config), num_outputs, device)
        checked = check_factory(config.replica.factory, replica, device)
        check_read(config, reads)
        return checked
    model = build_model(config.model, num_outputs)
    criterion = build_criterion(config.criterion)
    check_criterion(criterion, num_outputs)
    model, criterion = model.to(device), criterion.to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
    compile_model(model, config.model.compile, device)
    with _torch_errors_as_usage("optim", f"{config.optim.name} cannot train this model"):
        optimizer = build_optimizer(config.optim, model)
    check_optimizer("optim", optimizer, device)
    with _torch_errors_as_usage("schedule", f"{config.schedule.name} cannot drive {config.optim.name}"):
        scheduler = build_scheduler(config.schedule, optimizer)
    return Replica(model, criterion, optimizer, scheduler, scheduler_per=config.schedule.per)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the model with a newly drawn head for `num_classes`, on the CPU.

    With `weights`, all layers are drawn as from scratch. Then everything except the head is loaded, which draws
    nothing, and the head is drawn again with the default initialization of nn.Linear or nn.Conv2d. (A ViT's own
    initialization is all zeros, which would be the same head for all seeds.) So the head and the state of the
    generators depend only on the seed, the model and the number of classes. The head of a `factory` is kept as the
    factory drew it.

    Raises:
        UsageError: If there is no such model, or the weights cannot be loaded into it.
    """
    if config.factory is not None:
        return _build_from_factory(config, config.factory, num_classes)
    names = torchvision.models.list_models(module=torchvision.models)
    if config.name not in names:
        raise UsageError(
            f"model.name: torchvision has no classification model {config.name!r}. {nearest(config.name, names)}",
            code="unknown-model",
            key="model.name",
            value=config.name,
        )
    published = None if config.weights is None else find_published(config.name, config.weights)
    arguments = {**_ARGUMENTS.get(config.name, {}), **builder_arguments(config.name, published)}
    model = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **arguments)
    if config.weights is not None:
        head = load_pretrained(model, config.weights, published, num_classes)
        assert head is not None, f"{config.name} of this torchvision has no linear or convolutional head"
        model.get_submodule(head).reset_parameters()
    return model


_ARGUMENTS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
"""Arguments that disable auxiliary heads, with which these two models return several logits in training mode."""


def _build_from_factory(config: ModelConfig, factory: str, num_classes: int) -> nn.Module:
    model = call_function("model.factory", factory, num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise factory_error("model.factory", f"{factory!r} returned {type(model).__name__}. Return an nn.Module.")
    check_initialized("model.factory", model)
    if config.weights is not None:
        if not is_file(config.weights):
            raise UsageError(
                f"model.weights: {config.weights!r} names weights of torchvision, but the model comes from "
                "model.factory. Name a weights file, or load torchvision's weights in your function.",
                code="weights-of-another-model",
                key="model.weights",
                value=config.weights,
            )
        load_pretrained(model, config.weights, None, num_classes)
    return model


def weights_digest(config: RunConfig) -> str | None:
    """Return 32 hex digits over the weights file of the replica just built, None if it has no such file."""
    weights = config.model.weights
    if weights is None or config.replica.factory is not None:
        return None
    published = None if is_file(weights) else find_published(config.model.name, weights)
    with (Path(weights).expanduser() if published is None else cache_path(published)).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def broadcast_state(model: nn.Module, channel: Channel, with_rng: bool) -> None:
    """Copy rank 0's parameters and buffers to every replica, in place.

    If replicas do not have the same tensors, nothing is sent: the comparison of the build names what differs.

    Note:
        Collective: call on every rank.

    Args:
        model: This replica's model.
        channel: The control channel between all replicas.
        with_rng: Also copy the state of rank 0's random generators.
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
    """Compile `model` in place with torch.compile.

    Parameters, names and state_dict keys do not change. Nothing is compiled before the first forward pass.

    Args:
        model: The model to compile.
        backend: `model.compile` of the config: False for no compilation, True for inductor, or a backend's name.
        device: The model's device.

    Raises:
        UsageError: If the backend needs a C++ compiler and there is none.
    """
    if backend is False:
        return
    name = "inductor" if backend is True else backend
    if name == "inductor" and device.type == "cpu":
        _check_cpp_compiler()
    # Compile each batch size separately. By default, torch compiles dynamic code at the second batch size, which may
    # round differently, and a replay of the first steps would run that code instead of the one that they ran.
    model.compile(backend=name, dynamic=False)


def _check_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "model.compile: the backend 'inductor' generates C++ for the CPU, and there is no working C++ compiler. "
            "Install one (apt-get install g++), name yours in the environment variable CXX, or use 'aot_eager'.",
            code="no-compiler",
            key="model.compile",
        ) from None


def _num_outputs(config: RunConfig, num_classes: int) -> int:
    """Return `model.num_classes`, by default the data set's, after checking that no label exceeds the logits."""
    wanted = config.model.num_classes
    if wanted is not None and wanted < num_classes:
        raise UsageError(
            f"model.num_classes: {wanted} is fewer than the {num_classes} classes of the data set "
            f"{config.data.name!r} (data.name). Set it to null to use the data set's, or to {num_classes} or more.",
            code="too-few-outputs",
            key="model.num_classes",
            value=wanted,
            num_classes=num_classes,
        )
    return wanted or num_classes


@contextmanager
def _torch_errors_as_usage(key: str, problem: str) -> Iterator[None]:
    """Turn torch's ValueError and TypeError into a UsageError that begins with `key` and `problem`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{key}: {problem}: {error}", code="refused-by-torch", key=key) from None
