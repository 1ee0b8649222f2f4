"""Caches of decoded images: `data.cache`, and `data.decode: node`, which shares them between replicas on a node."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dreplica.config.schema import DataConfig
from dreplica.data.cache.device_cache import DeviceCachedImages, DeviceImageStore
from dreplica.data.cache.shared_file_cache import Item, Key, SharedFileCache
from dreplica.data.images.images import Images
from dreplica.data.samples import BatchId, DataSets, SampleSubset
from dreplica.distributed.process_group import World
from dreplica.environment.hardware import available_memory, spell_size
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_MAX_STEP_SKEW = 4
"""Upper bound, in batches, on how far apart replicas are that are compared at every step."""
_PREFETCHED = 2
_LARGEST = 2**26
"""Bytes of the largest image that can be cached whole: 4700 x 4700."""
_MEMORY_FILES = "/dev/shm"


@dataclass(frozen=True)
class BatchRing:
    """A ring buffer of the batches that the replicas of a node are loading, sized for the largest lag between them.

    A replica that is too late for a batch, or has received other samples than the others, decodes alone.
    """

    cache: SharedFileCache
    batch_size: int

    def __call__(self, batch_id: BatchId, keys: Sequence[Key], make: Callable[[int], Item]) -> list[Item]:
        """Return the items of a batch, making those that no replica has made yet.

        Args:
            batch_id: Identifies the batch, the same on every replica.
            keys: Key of each item.
            make: Makes the item at a position of `keys`.
        """
        first = batch_id[1] * self.batch_size % self.cache.num_slots
        return self.cache.fetch([(first + position, key) for position, key in enumerate(keys)], make)


@dataclass(frozen=True)
class _File:
    """The dimensions of a shared file."""

    num_slots: int
    slot_size: int
    size: float
    """Bytes that the file takes in the end, estimated where sizes differ."""


def attach_shared_caches(data: DataSets, config: DataConfig, world: World) -> DataSets:
    """Return the data with the caches of `data.cache: memory` and `data.decode: node`.

    Replicas on one host with equal `data` sections share. The files are unlinked as soon as all replicas have opened
    them, so that none is left behind, however the run ends.

    Note:
        Collective: call on every rank.

    Args:
        data: This replica's data.
        config: The section `data` of this replica.
        world: All replicas.

    Raises:
        SharedUsageError: If the data are not images, or there is not enough memory.
    """
    wanted = config.cache != "none" or config.decode == "node"
    owner = world.replica_id if config.decode == "replica" else "all"
    sharing_key = f"{owner} {config.model_dump_json(exclude={'num_workers'})}" if wanted else None
    rows = world.channel.gather((world.host, sharing_key, config.num_workers))
    if all(other is None for _, other, _ in rows):
        return data
    here = {rank: row for rank, row in enumerate(rows) if row[0] == world.host}
    num_workers_by_rank = {
        rank: num_workers
        for rank, (_, other, num_workers) in here.items()
        if sharing_key is not None and other == sharing_key
    }
    files = world.together(lambda: _files(data, config, num_workers_by_rank) if num_workers_by_rank else {})
    num_copies = len({other for _, other, _ in here.values() if other is not None})
    paths: dict[str, str] = {}
    try:
        creates = files and min(num_workers_by_rank) == world.replica_id
        paths |= world.together(lambda: _create(files, config, num_copies) if creates else {})
        created = world.channel.gather(paths)
        caches = world.together(
            lambda: {
                name: SharedFileCache(_open(created[min(num_workers_by_rank)][name]), file.num_slots, file.slot_size)
                for name, file in files.items()
            }
        )
    finally:
        for path in paths.values():
            os.unlink(path)
    ring = BatchRing(caches["ring"], _batch_size(data, config)) if "ring" in caches else None
    train, val = (
        dataset.with_caches(caches.get(name), set_id, ring) if isinstance(dataset, Images) else dataset
        for set_id, (name, dataset) in enumerate((("train", data.train), ("val", data.val)))
    )
    return replace(data, train=train, val=val)


def cache_on_device(data: DataSets, config: DataConfig, device: torch.device, world: World) -> DataSets:
    """Return the data with the caches of `data.cache: device`.

    Note:
        Collective: call on every rank.

    Args:
        data: This replica's data.
        config: The section `data` of this replica.
        device: This replica's device.
        world: All replicas.

    Raises:
        SharedUsageError: If there is not enough memory, or the augmentation computes pixels.
    """
    wanted = config.cache == "device"
    users = world.channel.gather((world.host, str(device)) if wanted else None)
    if all(user is None for user in users):
        return data
    num_copies = users.count((world.host, str(device)))
    stores = world.together(lambda: _make_stores(data, config, device, num_copies) if wanted else [])
    if not wanted:
        return data
    return replace(data, train=DeviceCachedImages(data.train, stores[0]), val=DeviceCachedImages(data.val, stores[1]))


def _make_stores(data: DataSets, config: DataConfig, device: torch.device, num_copies: int) -> list[DeviceImageStore]:
    """Return storage for the images, of which `num_copies` replicas keep a copy on the same device."""
    sets = [part.dataset if isinstance(part, SampleSubset) else part for part in (data.train, data.val)]
    if any(part.augmentation.transform is not None for part in sets):  # type: ignore[attr-defined]
        raise _cache_error(
            "cache",
            f"'device' supports only augmentations that move pixels (flip, crop_flip), but data.augment is "
            f"{config.augment!r}. Use one of those, or --data.cache memory.",
            "augmentation-not-cacheable",
        )
    shapes = [(len(part), images.size) for part, images in zip((data.train, data.val), sets, strict=True)]  # type: ignore[arg-type, attr-defined]
    needed = sum(num_samples * 3 * size**2 for num_samples, size in shapes)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed > free // num_copies:
        raise _cache_error(
            "cache",
            f"'device' needs {spell_size(needed)} for the decoded images of each of {num_copies} replicas, but only "
            f"{spell_size(free)} of memory are free on {device}. Use --data.cache memory, or a smaller "
            "--data.image_size.",
            "not-enough-memory",
            needed=needed * num_copies,
            free=free,
        )
    log.info("data.cache: 'device': %s of decoded images, stored during the first epoch", spell_size(needed))
    return [DeviceImageStore(num_samples, size, device) for num_samples, size in shapes]


def _batch_size(data: DataSets, config: DataConfig) -> int:
    return min(config.batch_size, max(len(data.train), len(data.val)))  # type: ignore[arg-type]


def _files(data: DataSets, config: DataConfig, num_workers_by_rank: dict[int, int]) -> dict[str, _File]:
    """Return the files that the given ranks share, by name."""
    key, value = ("cache", config.cache) if config.cache != "none" else ("decode", config.decode)
    sets: dict[str, Any] = {"train": data.train, "val": data.val}
    for dataset in sets.values():
        if not isinstance(dataset, Images):
            raise _cache_error(
                key,
                f"{value!r} applies to images that are decoded, but {config.name!r} provides "
                f"{type(dataset).__name__}. Remove it, or set data.image_size if these are images.",
                "not-images",
            )
    if config.cache == "memory":
        sizes = {name: images.cached_bytes_per_image() for name, images in sets.items()}
        return {
            name: _File(
                len(images), int(sizes[name]) if images.augmentation.fit else _LARGEST, len(images) * sizes[name]
            )
            for name, images in sets.items()
        }
    if len(num_workers_by_rank) == 1:
        return {}
    num_slots = (2 * _PREFETCHED * max(num_workers_by_rank.values()) + _MAX_STEP_SKEW) * _batch_size(data, config)
    slot_size = 3 * max(images.size for images in sets.values()) ** 2
    return {"ring": _File(num_slots, slot_size, num_slots * slot_size)}


def _create(files: dict[str, _File], config: DataConfig, num_copies: int) -> dict[str, str]:
    """Create the files, empty, in a folder with enough space for `num_copies` of each on this host."""
    size = sum(file.size for file in files.values())
    needed, available = num_copies * size, available_memory()
    key, value, remedy = "decode", "'node'", "--data.decode replica"
    if config.cache == "memory":
        key, value, remedy = "cache", "'memory'", "--data.cache none"
        if num_copies > 1 and config.decode == "replica":
            remedy = f"--data.decode node (one copy instead of {num_copies}), or {remedy}"
    if needed > available:
        raise _cache_error(
            key,
            f"{value} needs about {spell_size(needed)} for decoded images on this host, but only "
            f"{spell_size(available)} of memory are free. Free some, or use {remedy}.",
            "not-enough-memory",
            needed=needed,
            free=available,
        )
    # Files in /dev/shm are memory. Elsewhere the system keeps what it can of them in memory.
    folders = [folder for folder in (_MEMORY_FILES, tempfile.gettempdir()) if os.path.isdir(folder)]
    suitable = [folder for folder in folders if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed]
    if not suitable:
        raise _cache_error(
            key,
            f"{value} needs about {spell_size(needed)}, but there is not enough space in {' or '.join(folders)}. "
            f"Enlarge one (Docker: --shm-size), point TMPDIR at a folder with enough space, or use {remedy}.",
            "not-enough-space",
            needed=needed,
            folders=folders,
        )
    log.info("data.%s: %s: about %s of decoded images, in %s", key, value, spell_size(size), suitable[0])
    paths = {}
    for name in files:
        descriptor, paths[name] = tempfile.mkstemp(prefix="dreplica-", dir=suitable[0])
        os.close(descriptor)
    return paths


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _cache_error(
            "decode",
            f"'node', but {path!r}, which another replica on this host created, cannot be opened ({error.strerror}). "
            "It may run in another container or as another user. Use --data.decode replica.",
            "shared-file-not-opened",
            path=path,
        ) from None


def _cache_error(key: str, problem: str, code: str, **fields: Any) -> UsageError:
    return UsageError(f"data.{key}: {problem}", code=code, key=f"data.{key}", **fields)
