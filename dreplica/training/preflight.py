"""Found out before the first step: would the smallest part of a batch stop BatchNorm in mid-epoch?"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from dreplica.data.loading.loader import load_again
from dreplica.errors import UsageError
from dreplica.state.rng import get_rng_state, set_rng_state

if TYPE_CHECKING:
    from dreplica.config.schema import RunConfig

from typing import TYPE_CHECKING

from dreplica.data.samples import image_shape

if TYPE_CHECKING:
    from dreplica.config.schema import RunConfig


def smallest_part(num_samples: int, batch_size: int, accumulate: int, max_steps: int | None) -> int:
    """Samples in the smallest forward pass of training: batches are cut into `accumulate` parts, as by `chunk`."""
    whole, rest = divmod(num_samples, batch_size)
    batches = {batch_size} if whole else set()
    if rest and (max_steps is None or max_steps > whole):
        batches.add(rest)
    return min(_last_chunk(size, min(accumulate, size)) for size in batches)


def check_smallest_part(model: nn.Module, dataset: Dataset[Any], config: "RunConfig", device: torch.device) -> None:
    """Raises UsageError if a forward pass of one sample is to come and this model's BatchNorm refuses it.

    torch refuses where a channel has a single value: no variance can be taken of it. Whether one has depends on the
    model and the image size, so the model is asked; neither its buffers nor the generators are changed.
    """
    size = smallest_part(
        len(dataset),  # type: ignore[arg-type]  # Dataset has no __len__ of its own
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
            f"data.batch_size: {config.data.batch_size} leaves a forward pass of a single sample (of "
            f"{len(dataset)} samples, train.accumulate {config.train.accumulate}), and this model's BatchNorm cannot "  # type: ignore[arg-type]
            f"take a variance of one value per channel. Choose a batch_size that leaves at least two, "
            f"{config.data.batch_size + 1} for instance, or fewer parts."
        ) from None
    finally:
        set_rng_state(rng)


@torch.no_grad()
def _forward_one(model: nn.Module, dataset: Dataset[Any], device: torch.device) -> None:
    inputs = load_again(dataset, torch.tensor([0]), device).inputs
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.func.functional_call(model, buffers, (inputs,))


def _last_chunk(size: int, parts: int) -> int:
    chunk = -(-size // parts)
    return size % chunk or chunk


def check_image_size(model: nn.Module, dataset: Dataset[Any], config: "RunConfig") -> None:
    """Raises UsageError if a model of torchvision's refuses images as large as the data set's: a ViT takes one size.

    It is asked on the meta device, where shapes are computed and no numbers; a compiled one is not. Neither its buffers
    nor the generators are changed.
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
        return  # an operator without shapes: the first step will tell
    except (AssertionError, RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0].rstrip(".!")
        raise UsageError(
            f"model.name: {config.model.name} does not take images of {shape[1]} x {shape[2]} ({text}). Set "
            "data.image_size to what it takes, 224 in most cases, or name another model."
        ) from None
    finally:
        set_rng_state(rng)
