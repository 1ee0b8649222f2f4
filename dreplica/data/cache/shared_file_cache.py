"""A file of uint8 images that processes of one node fill together: each is made by whichever needs it first."""

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
"""Pixels, uint8, three dimensions; a label."""

Key = tuple[int, int, int, int]
"""What is in a slot; the same key stands for the same bytes."""

_PATIENCE = 10.0
"""Seconds that other processes, alive but perhaps stopped, are waited for before an item is made here, too."""
_NAP = 0.0005
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HEAD = struct.Struct("<8q")
"""Key, label, shape. A slot of a new file is all zeros, and no image is empty."""
_DIGEST_SIZE = 16
_ENTRY_SIZE = _HEAD.size + _DIGEST_SIZE


class Shelf:
    """`num_slots` items in an open file, for this process, those that it forks, and those that open the file, too.

    An entry holds a digest over key, label, shape and pixels, and an item whose digest is another is not there: so it
    does not matter in which order bytes are written and read, nor whether a writer died halfway or a bit has flipped.
    The lock of a slot is a lock on a byte of the file, which the operating system releases when its process dies,
    however it dies: nobody waits for the dead. It is between processes: each opens the file once. Read and written by
    system calls, not mapped: where memory or disk are full, that is an error then, and no fatal signal; what does not
    fit is made anew each time.

    Args:
        descriptor: of the file, empty when first used, open for reading and writing; closed with this object.
        num_slots: the same for all who share the file.
        slot_size: bytes between one slot's pixels and the next one's, likewise. The file is sparse, so it only takes
            what is written: where sizes differ, this is the largest that is kept.
    """

    def __init__(self, descriptor: int, num_slots: int, slot_size: int) -> None:
        self.num_slots, self.slot_size, self._descriptor = num_slots, slot_size, descriptor
        self._warned = False
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> Any:
        """For workers that are not forked, which inherit no open files."""
        return _reopen, (DupFd(self._descriptor), self.num_slots, self.slot_size)

    def fetch(self, wanted: Sequence[tuple[int, Key]], make: Callable[[int], Item]) -> list[Item]:
        """What the slots hold under their keys, in this order; `make(position)` gives what is not there, to be kept.

        What another process is just making comes last; it is waited for until that has made it, has failed or died, but
        no longer than ten seconds. Raises what `make` raises.
        """
        found: dict[int, Item] = {}
        waiting, progressed = list(range(len(wanted))), time.monotonic()
        while waiting:
            for position in waiting:
                item = self._take(*wanted[position], position, make)
                if item is not None:
                    found[position] = item
            still = [position for position in waiting if position not in found]
            now = time.monotonic()
            if len(still) < len(waiting):
                waiting, progressed = still, now
            elif now - progressed < _PATIENCE:
                time.sleep(_NAP)
            else:
                found |= {position: make(position) for position in waiting}
                break
        return [found[position] for position in range(len(wanted))]

    def _take(self, slot: int, key: Key, position: int, make: Callable[[int], Item]) -> Item | None:
        """None while another process is making it."""
        item = self._read(slot, key)
        if item is not None or not self._lock(slot):
            return item
        try:
            item = self._read(slot, key)  # made since
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
        """The slot's lock is held."""
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
                log.warning("no room to keep a decoded image (%s): such are decoded again each time", error.strerror)
            self._warned = True

    def _write_all(self, content: memoryview, offset: int) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(self._descriptor, content[done:], offset + done)

    def _offset(self, slot: int) -> int:
        return self.num_slots * _ENTRY_SIZE + slot * self.slot_size

    def _lock(self, slot: int) -> bool:
        """Whether it could be had; does not wait."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except (BlockingIOError, PermissionError):
            return False
        return True


def _digest(head: bytes, pixels: NDArray[numpy.uint8]) -> bytes:
    hashed = xxhash.xxh3_128(head)
    hashed.update(pixels.data)
    return hashed.digest()


def _reopen(duplicate: Any, num_slots: int, slot_size: int) -> Shelf:
    return Shelf(duplicate.detach(), num_slots, slot_size)
