"""Checks before the first step: of batch sizes that BatchNorm rejects, and of image sizes that the model rejects."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from dreplica.config.schema import RunConfig
from dreplica.data.loading.loader import reload_batch
from dreplica.data.samples import image_shape
from dreplica.errors import UsageError
from dreplica.state.rng import get_rng_state, set_rng_state


def smallest_part(num_samples: int, batch_size: int, accumulate: int, max_steps: int | None) -> int:
    """Return the number of samples in the smallest forward pass of training.

    Args:
        num_samples: Samples in the training set.
        batch_size: Samples per batch.
        accumulate: Parts into which `torch.chunk` splits each batch.
        max_steps: Number of steps to take. None for whole epochs.
    """
    whole, rest = divmod(num_samples, batch_size)
    batches = {batch_size} if whole else set()
    if rest and (max_steps is None or max_steps > whole):
        batches.add(rest)
    return min(_last_chunk(size, min(accumulate, size)) for size in batches)


def check_smallest_part(model: nn.Module, dataset: Dataset[Any], config: RunConfig, device: torch.device) -> None:
    """Check that the model accepts the smallest forward pass of training.

    In training mode, BatchNorm raises if a channel has a single value, because it has no variance. That depends on the
    model and the image size, so one sample is passed through the model. Buffers and generators are not changed.

    Args:
        model: The model, in training mode.
        dataset: The training set.
        config: The run's config.
        device: Device of the model.

    Raises:
        UsageError: A forward pass will have one sample, and BatchNorm rejects it.
    """
    size = smallest_part(
        len(dataset),  # type: ignore[arg-type]  # Dataset does not declare __len__
        config.data.batch_size,
        config.train.accumulate,
        config.train.max_steps,
    )
    if size > 1 or not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        return
    rng = get_rng_state()
    try:
        _forward_one(model, dataset, device)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"data.batch_size: {config.data.batch_size} results in a forward pass of a single sample (of "
            f"{len(dataset)} samples, train.accumulate {config.train.accumulate}), and this model's BatchNorm needs "  # type: ignore[arg-type]
            "more than one value per channel. Set another data.batch_size, such as "
            f"{config.data.batch_size + 1}, or reduce train.accumulate.",
            code="single-sample-batch",
            batch_size=config.data.batch_size,
            accumulate=config.train.accumulate,
        ) from None
    finally:
        set_rng_state(rng)


@torch.no_grad()
def _forward_one(model: nn.Module, dataset: Dataset[Any], device: torch.device) -> None:
    inputs = reload_batch(dataset, torch.tensor([0]), device).inputs
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.func.functional_call(model, buffers, (inputs,))


def _last_chunk(size: int, parts: int) -> int:
    chunk = -(-size // parts)
    return size % chunk or chunk


def check_image_size(model: nn.Module, dataset: Dataset[Any], config: RunConfig) -> None:
    """Check that a torchvision model accepts the data set's image size.

    A ViT, for instance, accepts a single size. The forward pass runs on the meta device, which computes shapes only.
    Compiled models and models from a factory are not checked. Buffers and generators are not changed.

    Args:
        model: The model.
        dataset: The training set.
        config: The run's config.

    Raises:
        UsageError: The model rejects images of this size.
    """
    shape = image_shape(dataset)
    if shape is None or config.model.factory or config.replica.factory or config.model.compile:
        return
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    rng = get_rng_state()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (torch.empty(2, *shape, device="meta"),))
    except NotImplementedError:
        return  # an operator without meta kernel: the first step shows whether the size fits
    except (AssertionError, RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0].rstrip(".!")
        raise UsageError(
            f"model.name: {config.model.name} does not accept images of {shape[1]} x {shape[2]} ({text}). Set "
            "data.image_size to the size that it accepts, 224 in most cases, or choose another model.",
            code="image-size",
            model=config.model.name,
            size=tuple(shape[1:]),
        ) from None
    finally:
        set_rng_state(rng)
