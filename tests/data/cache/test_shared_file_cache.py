"""Tests of the shared file cache: items are made once, keys always match, and no process waits for a dead one."""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from dreplica.data.cache import shared_file_cache
from dreplica.data.cache.shared_file_cache import Item, Key, SharedFileCache

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "cache").touch()
    return tmp_path / "cache"


def open_cache(path: Path, num_slots: int = 4, slot_size: int = 1000) -> SharedFileCache:
    return SharedFileCache(os.open(path, os.O_RDWR), num_slots, slot_size)


def item(value: int, *shape: int) -> Item:
    return numpy.full(shape or (3, 2, 3), value, dtype=numpy.uint8), value


def key(index: int, epoch: int = 0) -> Key:
    return (0, epoch, 0, index)


def fail(_position: int) -> Item:
    raise AssertionError("made, although it is stored")


def values(found: Item) -> tuple[tuple[int, ...], set[int], int]:
    return found[0].shape, set(found[0].flatten().tolist()), found[1]


def fetch(own: SharedFileCache, slot: int, value: int | None = None, epoch: int = 0) -> set[int]:
    """Return the pixels of one slot. A missing item is made of `value`; None requires that it is stored."""
    (found,) = own.fetch([(slot, key(slot, epoch))], fail if value is None else lambda _: item(value))
    return values(found)[1]


def test_item_is_made_once_for_all_processes(file: Path) -> None:
    one, other = open_cache(file), open_cache(file)
    made = [item(slot + 5, 3, slot + 1, 7) for slot in (3, 0, 2)]
    wanted = [(slot, key(slot)) for slot in (3, 0, 2)]
    assert [values(found) for found in one.fetch(wanted, made.__getitem__)] == [values(each) for each in made]
    assert [values(found) for found in other.fetch(wanted[::-1], fail)] == [values(each) for each in made[::-1]]
    assert fetch(other, 1, 9) == {9}


def test_another_key_replaces_the_item(file: Path) -> None:
    own = open_cache(file)
    for epoch in (1, 2, 3):
        assert fetch(own, 0, epoch, epoch) == {epoch}
        assert fetch(own, 1, 100 + epoch, epoch) == {100 + epoch}
        assert fetch(own, 0, None, epoch) == {epoch}
        assert fetch(own, 1, None, epoch) == {100 + epoch}
    assert fetch(own, 0, 7, 1) == {7}


@pytest.mark.parametrize("part", range(4))
def test_every_part_of_the_key_counts(part: int, file: Path) -> None:
    own = open_cache(file)
    changed = tuple(1 if number == part else 0 for number in range(4))
    own.fetch([(0, (0, 0, 0, 0))], lambda _: item(1))
    assert values(own.fetch([(0, changed)], lambda _: item(2))[0])[1] == {2}  # type: ignore[list-item]


def test_item_overwritten_during_a_read_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = open_cache(file), open_cache(file)
    fetch(own, 0, 1, epoch=1)
    preadv = os.preadv

    def read_slowly(descriptor: int, buffers: Any, offset: int) -> int:
        monkeypatch.setattr(os, "preadv", preadv)
        fetch(other, 0, 2, epoch=2)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_slowly)
    assert fetch(own, 0, 3, epoch=1) == {3}


@pytest.mark.parametrize(
    "byte", [0, 33, 40, 64, 79, 4 * shared_file_cache._ENTRY_SIZE, 4 * shared_file_cache._ENTRY_SIZE + 17]
)
def test_flipped_bit_makes_an_item_missing(byte: int, file: Path) -> None:
    own = open_cache(file)
    fetch(own, 0, 1)
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)
    assert fetch(own, 0, 2) == {2}
    assert fetch(own, 0) == {2}


def test_item_made_just_before_the_lock_is_used(file: Path) -> None:
    own, other = open_cache(file), open_cache(file)
    lock = own._lock

    def lock_late(slot: int) -> bool:
        fetch(other, slot, 4)
        return lock(slot)

    own._lock = lock_late  # type: ignore[method-assign]
    assert fetch(own, 1) == {4}


def hold(path: Path, begun: Any, proceed: Any) -> None:
    def make(_position: int) -> Item:
        begun.set()
        proceed.wait(30)
        return item(7)

    open_cache(path).fetch([(2, key(2))], make)


def start_holding(path: Path) -> tuple[Any, Any]:
    """Start a process that is making slot 2; return it and the event that lets it continue."""
    begun, proceed = FORK.Event(), FORK.Event()
    process = FORK.Process(target=hold, args=(path, begun, proceed), daemon=True)
    process.start()
    assert begun.wait(10)
    return process, proceed


@pytest.mark.process
def test_items_of_other_processes_are_waited_for_last(file: Path) -> None:
    process, proceed = start_holding(file)
    made = []

    def make(position: int) -> Item:
        made.append(position)
        if len(made) == 2:
            proceed.set()
        return item(position)

    found = open_cache(file).fetch([(1, key(1)), (2, key(2)), (3, key(3))], make)
    assert [values(each)[1] for each in found] == [{0}, {7}, {2}]
    assert made == [0, 2]
    process.join(10)


@pytest.mark.process
def test_item_of_a_killed_process_is_made_by_another(file: Path) -> None:
    process, _ = start_holding(file)
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    assert fetch(open_cache(file), 2, 8) == {8}
    assert time.monotonic() - began < shared_file_cache._LOCK_TIMEOUT / 2
    process.join(10)
    assert fetch(open_cache(file), 2) == {8}


@pytest.mark.process
def test_wait_for_a_stopped_process_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = start_holding(file)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(shared_file_cache, "_LOCK_TIMEOUT", 0.05)
    assert fetch(open_cache(file), 2, 8) == {8}
    process.kill()
    process.join(10)


def can_lock(path: Path) -> bool:
    return open_cache(path)._lock(0)


@pytest.mark.process
def test_failure_releases_the_lock(file: Path) -> None:
    own = open_cache(file)
    with pytest.raises(AssertionError, match="made"):
        fetch(own, 0)
    with FORK.Pool(1) as pool:  # a process does not see its own locks
        assert pool.apply(can_lock, (file,)) is True
    assert fetch(own, 0, 1) == {1}


def keep_two(own: SharedFileCache) -> list[set[int]]:
    return [fetch(own, 0, 1), fetch(own, 0, 2)]


def test_item_that_does_not_fit_is_warned_about_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert keep_two(open_cache(file, slot_size=18)) == [{1}, {1}]  # just fits
        file.write_bytes(b"")
        assert keep_two(open_cache(file, slot_size=17)) == [{1}, {2}]
    assert [record.getMessage() for record in caplog.records] == [
        "no space to cache a decoded image (File too large): images that do not fit are decoded again each time"
    ]


def test_full_disk_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    own = SharedFileCache(os.open("/dev/full", os.O_RDWR), 4, 1000)
    own._lock = lambda slot: True  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        assert keep_two(own) == [{1}, {2}]
    assert ["No space left on device" in record.getMessage() for record in caplog.records] == [True]


def read_there(pipe: Any, own: SharedFileCache) -> None:
    pipe.send(fetch(own, 0))


def test_spawned_workers_share_the_file(file: Path) -> None:
    own = open_cache(file)
    fetch(own, 0, 6)
    file.unlink()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_there, args=(theirs, own), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == {6}
    process.join(10)
