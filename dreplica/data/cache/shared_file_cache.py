"""A file of uint8 images that the processes of a node fill together, each image by the process that needs it first."""

import errno
import fcntl
import logging
import os
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy
import xxhash
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Item = tuple[NDArray[numpy.uint8], int]
"""Pixels, uint8 with three dimensions, and a label."""

Key = tuple[int, int, int, int]
"""Identifies an item. Equal keys mean equal bytes."""

_LOCK_TIMEOUT = 10.0
"""Seconds to wait for an item of another process, which may be alive but stopped, before making it here, too."""
_POLL_INTERVAL = 0.0005
"""Seconds between two looks at an item of another process."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HEAD = struct.Struct("<8q")
"""Layout of an entry: key, label, shape. A slot of a new file is all zeros, and no image is empty."""
_DIGEST_SIZE = 16
_ENTRY_SIZE = _HEAD.size + _DIGEST_SIZE


class SharedFileCache:
    """A cache of `num_slots` items in an open file, shared by all processes that open or inherit it.

    An entry holds a digest over key, label, shape and pixels, and an item with another digest counts as missing. So the
    order of reads and writes does not matter, nor whether a writer died halfway or a bit has flipped.

    A slot is locked by a lock on one byte of the file. The operating system releases it when its process dies, however
    it dies, so no process waits for a dead one. Such locks hold between processes, so each process must open the file
    only once.

    The file is read and written by system calls, not mapped: if memory or disk is full, that is an error instead of a
    fatal signal. An item that does not fit is made again each time.

    Args:
        descriptor: Descriptor of the file, open for reading and writing, empty when first used. It is closed with this
            object.
        num_slots: Number of items, the same for all processes.
        slot_size: Bytes from one slot's pixels to the next one's, the same for all processes, and the largest item that
            is kept. The file is sparse: only what is written takes space.
    """

    def __init__(self, descriptor: int, num_slots: int, slot_size: int) -> None:
        self.num_slots, self.slot_size, self._descriptor = num_slots, slot_size, descriptor
        self._warned = False
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> Any:
        # For workers that are not forked and so inherit no open files.
        return _reopen, (DupFd(self._descriptor), self.num_slots, self.slot_size)

    def fetch(self, wanted: Sequence[tuple[int, Key]], make: Callable[[int], Item]) -> list[Item]:
        """Return the items of the slots with these keys, making and storing those that are missing.

        Items that other processes are making come last. They are waited for until the other process has stored the
        item, failed or died, at most ten seconds.

        Args:
            wanted: Slot and key of each item.
            make: Makes the missing item at a position of `wanted`. What it raises passes.

        Returns:
            The items, in the order of `wanted`.
        """
        found: dict[int, Item] = {}
        waiting, progressed = list(range(len(wanted))), time.monotonic()
        while waiting:
            for position in waiting:
                item = self._read_or_make(*wanted[position], position, make)
                if item is not None:
                    found[position] = item
            still = [position for position in waiting if position not in found]
            now = time.monotonic()
            if len(still) < len(waiting):
                waiting, progressed = still, now
            elif now - progressed < _LOCK_TIMEOUT:
                time.sleep(_POLL_INTERVAL)
            else:
                found |= {position: make(position) for position in waiting}
                break
        return [found[position] for position in range(len(wanted))]

    def _read_or_make(self, slot: int, key: Key, position: int, make: Callable[[int], Item]) -> Item | None:
        """Return the item, None while another process is making it."""
        item = self._read(slot, key)
        if item is not None or not self._lock(slot):
            return item
        try:
            item = self._read(slot, key)  # another process may have made it just before the lock
            if item is None:
                item = make(position)
                self._write(slot, key, *item)
            return item
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, slot)

    def _read(self, slot: int, key: Key) -> Item | None:
        entry = os.pread(self._descriptor, _ENTRY_SIZE, slot * _ENTRY_SIZE)
        if len(entry) < _ENTRY_SIZE:
            return None
        *held, label, first, second, third = _HEAD.unpack_from(entry)
        if tuple(held) != key or first == 0:
            return None
        pixels = numpy.empty((first, second, third), dtype=numpy.uint8)
        view, done = pixels.data.cast("B"), 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], self._offset(slot) + done)
            if count == 0:
                return None
            done += count
        return (pixels, label) if _digest(entry[: _HEAD.size], pixels) == entry[_HEAD.size :] else None

    def _write(self, slot: int, key: Key, pixels: NDArray[numpy.uint8], label: int) -> None:
        """Write an item to a slot whose lock this process holds."""
        pixels = numpy.ascontiguousarray(pixels)
        head = _HEAD.pack(*key, label, *pixels.shape)
        try:
            if pixels.nbytes > self.slot_size:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            self._write_all(pixels.data.cast("B"), self._offset(slot))
            self._write_all(memoryview(head + _digest(head, pixels)), slot * _ENTRY_SIZE)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._warned:
                log.warning(
                    "no space to cache a decoded image (%s): images that do not fit are decoded again each time",
                    error.strerror,
                )
            self._warned = True

    def _write_all(self, content: memoryview, offset: int) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(self._descriptor, content[done:], offset + done)

    def _offset(self, slot: int) -> int:
        return self.num_slots * _ENTRY_SIZE + slot * self.slot_size

    def _lock(self, slot: int) -> bool:
        """Lock the slot without waiting, and return True on success."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except (BlockingIOError, PermissionError):
            return False
        return True


def _digest(head: bytes, pixels: NDArray[numpy.uint8]) -> bytes:
    hashed = xxhash.xxh3_128(head)
    hashed.update(pixels.data)
    return hashed.digest()


def _reopen(duplicate: Any, num_slots: int, slot_size: int) -> SharedFileCache:
    return SharedFileCache(duplicate.detach(), num_slots, slot_size)
