"""A file made by one process of a node while the others wait for it."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dreplica.errors import UsageError

log = logging.getLogger(__name__)


def once_per_node(path: Path, make: Callable[[], None]) -> None:
    """Sees to it that the file `path` exists: one process of this node calls `make`, the others wait for it.

    `make` puts the whole file there at once (a temporary name, then a rename) or raises UsageError, which those that
    waited raise, too. Whoever holds the lock calls it, whatever its local rank: the operating system releases the lock
    of a process that dies, and one of those that wait goes on in its place, so nobody waits for the dead. Where the
    folder is shared between nodes, it is once for all of them. No collective. Raises OSError where the folder cannot be
    written to; NotImplementedError where its file system has no locks.
    """
    if path.exists():
        return
    began = time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process of this node, which makes %s", path)
        lock.acquire()
    try:
        if not path.exists():
            _make(path, make, began)
    finally:
        lock.release()


def _make(path: Path, make: Callable[[], None], began: float) -> None:
    """Holds the lock. A failure is left beside the file, with its time: later than `began`, it is why one waited."""
    failure = path.with_name(f"{path.name}.failed")
    if failure.exists():
        when, _, message = failure.read_text(encoding="utf-8").partition("\n")
        if float(when) >= began:
            raise UsageError(message)
        failure.unlink()
    try:
        make()
    except UsageError as error:
        partial = failure.with_name(f"{failure.name}.partial")
        partial.write_text(f"{time.time()}\n{error}", encoding="utf-8")
        os.replace(partial, failure)
        raise
