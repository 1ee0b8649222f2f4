"""The parameters of a model as an optimizer should hold them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dreplica.state.stages import plain_name


def optimized_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimizer of this model holds, by name, tied ones once.

    After a forward pass, `fully_shard` leaves whole parameters in place of the shards that the optimizer holds, until
    the backward pass. The shards are returned for them.
    """
    shards = dict(_shards_of_whole_parameters(model))
    return {plain_name(name): shards.get(id(each), each) for name, each in model.named_parameters()}


def _shards_of_whole_parameters(model: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield the id of each whole parameter that is registered in place of its shard, and the shard."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is None:
            continue
        for group in _parameter_groups(state()):
            for each in getattr(group, "fsdp_params", ()):
                whole, shard = getattr(each, "_unsharded_param", None), getattr(each, "sharded_param", None)
                if whole is not None and shard is not None:
                    yield id(whole), shard


def _parameter_groups(state: Any) -> list[Any]:
    """Return the parameter groups of a module in `fully_shard`. Newer versions of torch have several of them."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def is_dtensor(tensor: Tensor) -> bool:
    """Return True for a DTensor, without importing it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
