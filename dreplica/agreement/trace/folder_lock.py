"""A lock on a run folder, so that two processes never write into one."""

import fcntl
import logging
from pathlib import Path

log = logging.getLogger(__name__)


class FolderLock:
    """A lock on a run folder, held until it is released or the process ends.

    It is a lock on a file (`fcntl.lockf`). The operating system releases it however the process ends, and forked
    processes do not inherit it.

    Args:
        folder: The run folder.

    Attributes:
        taken: True if another run has the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.taken = False
        self._file = (folder / ".lock").open("ab")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.taken = True
            self.release()
        except OSError as error:
            log.debug("file locks are not supported in %s: %s", folder, error)

    def release(self) -> None:
        """Release the lock."""
        self._file.close()
