"""Found out before the first step: does torchvision's model take images of this size?"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dreplica.data.samples import image_shape
from dreplica.errors import UsageError
from dreplica.replica.rng import get_rng_state, set_rng_state

if TYPE_CHECKING:
    from dreplica.config.schema import RunConfig


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
