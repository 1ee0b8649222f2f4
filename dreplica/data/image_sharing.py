"""`data.cache: memory` and `data.decode: node`: decoded images kept for later epochs, and shared on a node."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dreplica.config.schema import DataConfig
from dreplica.data.cache.device_cache import OnDevice, Store
from dreplica.data.cache.shared_file_cache import Item, Key, Shelf
from dreplica.data.images.images import Images
from dreplica.data.samples import DataSets, Kept, Place
from dreplica.distributed.process_group import World
from dreplica.environment.hardware import available_memory, spell_size
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_STEPS_APART = 4
"""Batches that replicas, compared at every step, may be apart, with some to spare."""
_PREFETCHED = 2
_LARGEST = 2**26
"""Bytes of an image that can be kept whole: 4700 x 4700."""
_MEMORY_FILES = "/dev/shm"


@dataclass(frozen=True)
class Ring:
    """Batches that are being loaded, for the replicas of a node: as many as they can be apart.

    A replica that comes too late for a batch, or was sent other samples than the others, decodes by itself.
    """

    shelf: Shelf
    batch_size: int

    def __call__(self, place: Place, keys: Sequence[Key], make: Callable[[int], Item]) -> list[Item]:
        first = place[1] * self.batch_size % self.shelf.num_slots
        return self.shelf.fetch([(first + position, key) for position, key in enumerate(keys)], make)


@dataclass(frozen=True)
class _File:
    """A shelf's."""

    num_slots: int
    slot_size: int
    size: float
    """Bytes that it will take, or so."""


def keep_and_share(data: DataSets, config: DataConfig, world: World) -> DataSets:
    """The data, kept in memory and shared as the section asks. A collective.

    Replicas on one host whose `data` sections are the same share. The files are unlinked as soon as all have them open,
    so that nothing is left behind, however the run ends. Raises SharedUsageError for data that are no images, and where
    there is not enough memory.
    """
    wanted = config.cache != "none" or config.decode == "node"
    owner = world.replica_id if config.decode == "replica" else "all"
    place = f"{owner} {config.model_dump_json(exclude={'num_workers'})}" if wanted else None
    rows = world.channel.gather((world.host, place, config.num_workers))
    if all(other is None for _, other, _ in rows):
        return data
    here = {rank: row for rank, row in enumerate(rows) if row[0] == world.host}
    mates = {
        rank: num_workers for rank, (_, other, num_workers) in here.items() if place is not None and other == place
    }
    files = world.together(lambda: _files(data, config, mates) if mates else {})
    num_copies = len({other for _, other, _ in here.values() if other is not None})
    paths: dict[str, str] = {}
    try:
        makes = files and min(mates) == world.replica_id
        paths |= world.together(lambda: _create(files, config, num_copies) if makes else {})
        made = world.channel.gather(paths)
        shelves = world.together(
            lambda: {
                name: Shelf(_open(made[min(mates)][name]), file.num_slots, file.slot_size)
                for name, file in files.items()
            }
        )
    finally:
        for path in paths.values():
            os.unlink(path)
    ring = Ring(shelves["ring"], _batch_size(data, config)) if "ring" in shelves else None
    train, val = (
        dataset.sharing(shelves.get(name), part, ring) if isinstance(dataset, Images) else dataset
        for part, (name, dataset) in enumerate((("train", data.train), ("val", data.val)))
    )
    return replace(data, train=train, val=val)


def keep_on_device(data: DataSets, config: DataConfig, device: torch.device, world: World) -> DataSets:
    """The data, kept on `device` where the section asks for it. A collective.

    Raises SharedUsageError where there is not enough memory, or for an augmentation that computes.
    """
    wanted = config.cache == "device"
    users = world.channel.gather((world.host, str(device)) if wanted else None)
    if all(user is None for user in users):
        return data
    num_copies = users.count((world.host, str(device)))
    stores = world.together(lambda: _make_stores(data, config, device, num_copies) if wanted else [])
    if not wanted:
        return data
    return replace(data, train=OnDevice(data.train, stores[0]), val=OnDevice(data.val, stores[1]))


def _make_stores(data: DataSets, config: DataConfig, device: torch.device, num_copies: int) -> list[Store]:
    """`num_copies`: how many replicas keep theirs on the same device."""
    sets = [part.dataset if isinstance(part, Kept) else part for part in (data.train, data.val)]
    if any(part.augmentation.transform is not None for part in sets):  # type: ignore[attr-defined]
        raise UsageError(
            f"data.cache: 'device' keeps images of one size and augments them by moving pixels (flip, crop_flip), but "
            f"data.augment is {config.augment!r}. Use one of those, or --data.cache memory."
        )
    shapes = [(len(part), images.size) for part, images in zip((data.train, data.val), sets, strict=True)]  # type: ignore[arg-type, attr-defined]
    needed = sum(num_samples * 3 * size**2 for num_samples, size in shapes)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed > free // num_copies:
        raise UsageError(
            f"data.cache: 'device' needs {spell_size(needed)} for the decoded images of each of {num_copies} replicas, "
            f"and {spell_size(free)} of memory are free on {device}. Use --data.cache memory, or a smaller "
            "--data.image_size."
        )
    log.info("data.cache: 'device': %s of decoded images, kept during the first epoch", spell_size(needed))
    return [Store(num_samples, size, device) for num_samples, size in shapes]


def _batch_size(data: DataSets, config: DataConfig) -> int:
    return min(config.batch_size, max(len(data.train), len(data.val)))  # type: ignore[arg-type]


def _files(data: DataSets, config: DataConfig, mates: dict[int, int]) -> dict[str, _File]:
    """`mates`: the number of workers of each replica that uses them."""
    key, value = ("cache", config.cache) if config.cache != "none" else ("decode", config.decode)
    sets: dict[str, Any] = {"train": data.train, "val": data.val}
    for dataset in sets.values():
        if not isinstance(dataset, Images):
            raise UsageError(
                f"data.{key}: {value!r} is for images that are decoded, but {config.name!r} gives "
                f"{type(dataset).__name__}. Leave it out; or, if these are images, set data.image_size."
            )
    if config.cache == "memory":
        sizes = {name: images.bytes_kept() for name, images in sets.items()}
        return {
            name: _File(
                len(images), int(sizes[name]) if images.augmentation.fit else _LARGEST, len(images) * sizes[name]
            )
            for name, images in sets.items()
        }
    if len(mates) == 1:
        return {}
    num_slots = (2 * _PREFETCHED * max(mates.values()) + _STEPS_APART) * _batch_size(data, config)
    slot_size = 3 * max(images.size for images in sets.values()) ** 2
    return {"ring": _File(num_slots, slot_size, num_slots * slot_size)}


def _create(files: dict[str, _File], config: DataConfig, num_copies: int) -> dict[str, str]:
    """Makes them, empty, where there is room. `num_copies`: how many there will be of each on this host."""
    size = sum(file.size for file in files.values())
    needed, available = num_copies * size, available_memory()
    key, remedy = "decode: 'node'", "--data.decode replica"
    if config.cache == "memory":
        key, remedy = "cache: 'memory'", "--data.cache none"
        if num_copies > 1 and config.decode == "replica":
            remedy = f"--data.decode node (one copy instead of {num_copies}), or {remedy}"
    if needed > available:
        raise UsageError(
            f"data.{key} needs about {spell_size(needed)} for decoded images on this host, and {spell_size(available)} "
            f"of memory are free. Free some, or use {remedy}."
        )
    # Files there are memory; elsewhere the system keeps what it can of them in memory.
    folders = [folder for folder in (_MEMORY_FILES, tempfile.gettempdir()) if os.path.isdir(folder)]
    roomy = [folder for folder in folders if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed]
    if not roomy:
        raise UsageError(
            f"data.{key} needs about {spell_size(needed)}, and there is no such room in {' or '.join(folders)}. "
            f"Enlarge one (Docker: --shm-size), point TMPDIR at a folder with room, or use {remedy}."
        )
    log.info("data.%s: about %s of decoded images, in %s", key, spell_size(size), roomy[0])
    paths = {}
    for name in files:
        descriptor, paths[name] = tempfile.mkstemp(prefix="dreplica-", dir=roomy[0])
        os.close(descriptor)
    return paths


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"data.decode: 'node', but {path!r}, which another replica on this host made, cannot be opened "
            f"({error.strerror}): in another container, or another user's? Use --data.decode replica."
        ) from None
