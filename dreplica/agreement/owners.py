"""Names of parameters that an optimizer has and the compared model does not have, such as those of a loss."""

import gc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dreplica.state.stages import parameter_names


def name_owners(
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], names: Sequence[str]
) -> dict[str, str]:
    """Return the module and attribute that hold parameters which are not the model's.

    Args:
        model: The model.
        optimizers: Name to optimizer.
        names: The parameters' names in the stage `optimizer`, such as `group0.params.3`.

    Returns:
        Name to `Class.attribute` for the parameters that a module of this process holds.
    """
    wanted: dict[Tensor, str] = {}
    for own_name, optimizer in optimizers.items():
        wanted |= {each: name for each, name in parameter_names(model, optimizer, own_name).items() if name in names}
    if not wanted:
        return {}
    found: dict[str, str] = {}
    # The loop passes its loss to nothing that is compared, so it is looked for among all objects, after a divergence.
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module):
            for attribute, parameter in vars(module).get("_parameters", {}).items():
                if parameter is not None and parameter in wanted:
                    found.setdefault(wanted[parameter], f"{type(module).__name__}.{attribute}")
    return found
