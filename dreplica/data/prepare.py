"""The data as a replica trains on them: loaded, shared, kept, rid of what cannot be read."""

import logging

import torch

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.samples import DataSets
from dreplica.data.sharing import keep_and_share, keep_on_device
from dreplica.data.skip import leave_out_unreadable
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError

log = logging.getLogger(__name__)


def prepare_data(config: DataConfig, augment_seed: int, world: World, device: torch.device) -> DataSets:
    """What the section of this replica says. A collective. Raises SharedUsageError."""
    data = world.together(lambda: load_data(config, augment_seed))
    data = keep_and_share(data, config, world)
    if config.on_error == "skip":
        data = leave_out_unreadable(data, world.channel, config.num_workers, f"{world.host} {config.root}")
        if data.skipped and world.is_coordinator:
            log.warning("data.on_error: skipped %d samples:\n  %s", len(data.skipped), "\n  ".join(data.skipped))
    world.together(lambda: _check_batch_size(config, len(data.train)))  # type: ignore[arg-type]
    return keep_on_device(data, config, device, world)


def _check_batch_size(config: DataConfig, num_samples: int) -> None:
    if config.batch_size > num_samples:
        raise UsageError(
            f"data.batch_size: {config.batch_size} is more than the {num_samples} samples of the training set. "
            f"Choose {num_samples} or fewer."
        )
