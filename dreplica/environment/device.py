"""Choice of the device of a replica."""

import os
from dataclasses import dataclass

import torch

from dreplica.config.schema import WorldConfig
from dreplica.distributed.launch.launcher_variables import sees_only_own_gpus
from dreplica.errors import UsageError


@dataclass(frozen=True)
class Device:
    """The device of one replica."""

    device: torch.device
    """CPU or CUDA device."""
    shared: bool = False
    """True if replicas on this node share a GPU."""


def bind_device(config: WorldConfig) -> Device:
    """Choose and set the device of this process, before the process group is initialized.

    Raises:
        UsageError: If `world.device` is `cuda` and this node has fewer GPUs than replicas.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if sees_only_own_gpus(os.environ, num_gpus):
        local_size = 1  # no other process uses them
    if config.device == "cuda" and num_gpus < local_size:
        fix = f"Start at most {num_gpus} replicas on this node, or use" if num_gpus else "Use"
        raise UsageError(
            f"world.device: 'cuda' requires one GPU for each of the {local_size} replicas on this node, but torch "
            f"finds {num_gpus}. {fix} --world.device auto, which shares GPUs, or uses the CPU if there are none.",
            code="too-few-gpus",
            key="world.device",
            gpus=num_gpus,
            replicas=local_size,
        )
    if num_gpus == 0:
        return Device(torch.device("cpu"))
    device = torch.device("cuda", local_rank % num_gpus)
    torch.cuda.set_device(device)
    return Device(device, shared=num_gpus < local_size)
