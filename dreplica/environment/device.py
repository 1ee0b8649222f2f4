"""device"""

import os
from dataclasses import dataclass

import torch

from dreplica.config.schema import WorldConfig
from dreplica.errors import UsageError


@dataclass(frozen=True)
class Device:
    """The device of one replica; `shared` when replicas on this node share a GPU."""

    device: torch.device
    shared: bool = False


def bind_device(config: WorldConfig) -> Device:
    """Picks and binds this process's device; call it before the process group is initialised.

    Raises UsageError where `world.device` is `cuda` and this node has fewer GPUs than replicas.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if config.device == "cuda" and num_gpus < local_size:
        raise UsageError(
            f"world.device: 'cuda' wants a GPU for each of the {local_size} replicas on this node, but torch sees "
            f"{num_gpus}. "
            + (f"Start no more than {num_gpus} replicas here, or use" if num_gpus else "Use")
            + " --world.device auto (shares GPUs, or runs on the CPU if there are none)."
        )
    if num_gpus == 0:
        return Device(torch.device("cpu"))
    device = torch.device("cuda", local_rank % num_gpus)
    torch.cuda.set_device(device)
    return Device(device, shared=num_gpus < local_size)
