"""The data sets of a run: loaded by name, cached, shared between replicas and checked."""

import logging
from collections.abc import Sequence

import torch

from dreplica.config.messages import nearest
from dreplica.config.schema import DataConfig
from dreplica.data.image_sharing import attach_shared_caches, cache_on_device
from dreplica.data.loading.unreadable import skip_unreadable
from dreplica.data.samples import DataSets
from dreplica.data.sources.digits import load_digits
from dreplica.data.sources.image_folder import load_image_folder
from dreplica.data.sources.torchvision_datasets import SETS, load_torchvision_set
from dreplica.data.sources.user_function import load_from_function
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_MOST_SKIPPED_SHOWN = 10


def prepare_data(config: DataConfig, augment_seed: int, world: World, device: torch.device) -> DataSets:
    """Load this replica's data sets, with caches, without unreadable samples if these are to be skipped.

    Note:
        Collective: call on every rank.

    Args:
        config: The section `data` of this replica.
        augment_seed: `seed.augment`.
        world: All replicas.
        device: This replica's device, for `data.cache: device`.

    Raises:
        SharedUsageError: On every replica, if the data of any replica cannot be loaded or trained on.
    """
    data = world.together(lambda: load_data(config, augment_seed))
    data = attach_shared_caches(data, config, world)
    if config.on_error == "skip":
        data = skip_unreadable(data, world.channel, config.num_workers, f"{world.host} {config.root}")
        if data.skipped and world.is_coordinator:
            log.warning("data.on_error: %s", _describe_skipped(data.skipped))
    world.together(lambda: _check_batch_size(config, len(data.train)))  # type: ignore[arg-type]
    return cache_on_device(data, config, device, world)


def _describe_skipped(skipped: Sequence[str]) -> str:
    """Return a line on how many samples are skipped, and a line for each of the first ones."""
    left = len(skipped) - _MOST_SKIPPED_SHOWN
    lines = [f"skipped {len(skipped)} sample{'s' * (len(skipped) != 1)}:", *skipped[:_MOST_SKIPPED_SHOWN]]
    return "\n  ".join([*lines, f"{left} more, which report.json lists"] if left > 0 else lines)


def load_data(config: DataConfig, augment_seed: int = 0) -> DataSets:
    """Load the data sets that `data.name` names, in this process alone and without caches.

    Args:
        config: The section `data`.
        augment_seed: `seed.augment`.

    Raises:
        UsageError: If there is no such data set, or it cannot be trained on.
    """
    if config.name == "digits":
        return load_digits(config)
    if config.name == "imagefolder":
        return load_image_folder(config, augment_seed)
    if ":" in config.name:
        return load_from_function(config, augment_seed)
    if config.name in SETS:
        return load_torchvision_set(config, augment_seed)
    raise UsageError(
        f"data.name: there is no data set {config.name!r}. {nearest(config.name, ['digits', 'imagefolder', *SETS])} "
        "Or name your own function: package.module:function.",
        code="unknown-data-set",
        key="data.name",
        value=config.name,
    )


def _check_batch_size(config: DataConfig, num_samples: int) -> None:
    if config.batch_size > num_samples:
        raise UsageError(
            f"data.batch_size: {config.batch_size} is more than the {num_samples} samples of the training set. "
            f"Choose {num_samples} or fewer.",
            code="batch-too-large",
            key="data.batch_size",
            value=config.batch_size,
            num_samples=num_samples,
        )
