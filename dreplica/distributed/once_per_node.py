"""Creation of a file by one process of a node while the other processes wait for it."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dreplica.distributed.failure import Failure
from dreplica.errors import UsageError

log = logging.getLogger(__name__)


def once_per_node(path: Path, make: Callable[[], None]) -> None:
    """Create a file in one process of this node, while the other processes wait for it.

    The process that gets the file lock calls `make`, independent of its local rank. The operating system releases the
    lock of a process that dies, and a waiting process takes over. Where the folder is shared between nodes, one process
    of all nodes creates the file. This is not a collective.

    Args:
        path: The file to create.
        make: Creates the file atomically (writes a temporary file, then renames it), or raises UsageError.

    Raises:
        UsageError: If `make` raised it in this process, or in the process that this one waited for.
        OSError: If the folder is not writable.
        NotImplementedError: If the file system has no locks.
    """
    if path.exists():
        return
    began = time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process of this node to create %s", path)
        lock.acquire()
    try:
        if not path.exists():
            _make(path, make, began)
    finally:
        lock.release()


def _make(path: Path, make: Callable[[], None], began: float) -> None:
    """Create the file under the lock.

    A failure is stored next to the file with its time. If that is later than `began`, this process waited for it.
    """
    failure = path.with_name(f"{path.name}.failed")
    if failure.exists():
        row = json.loads(failure.read_text(encoding="utf-8"))
        if row["time"] >= began:
            raise UsageError(row["message"], code=row["code"], **row["fields"])
        failure.unlink()
    try:
        make()
    except UsageError as error:
        partial = failure.with_name(f"{failure.name}.partial")
        row = {"time": time.time()} | Failure.from_exception(error).as_dict()
        partial.write_text(json.dumps(row), encoding="utf-8")
        os.replace(partial, failure)
        raise
