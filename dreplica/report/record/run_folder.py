"""The folder of one run: picked once, by rank 0."""

import fcntl
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dreplica.errors import UsageError

log = logging.getLogger(__name__)


def newest_run_folder(root: str, name: str) -> Path | None:
    """The folder of the newest run of this name; None if there is none."""
    folders = [*itertools.takewhile(Path.is_dir, _folders(root, name))]
    return folders[-1] if folders else None


class FolderLock:
    """Held by the run that writes to a folder, for as long as its process lives; `taken` if another run has it.

    A lock on a file (`fcntl.lockf`), which the operating system releases however the process ends, and which processes
    that are forked from it do not inherit.
    """

    def __init__(self, folder: Path) -> None:
        self.taken = False
        self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.taken = True
            self.release()
        except OSError as error:
            log.debug("locks do not work in %s: %s", folder, error)

    def release(self) -> None:
        """Gives it up."""
        os.close(self._descriptor)


def create_run_folder(root: str, name: str) -> Path:
    """Makes `root`/`name`, or with a suffix (-2, -3, …) where that is taken; atomic, so two runs never share one.

    Raises UsageError where it cannot be made.
    """
    for folder in _folders(root, name):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not folder.parent.is_dir():
                raise UsageError(f"run.root: {root!r} is a file. Name a folder with --run.root.") from None
        except OSError as error:
            raise UsageError(
                f"run.root: the run folder {str(folder)!r} cannot be made ({error.strerror}). "
                "Name a folder that you can write to with --run.root, or another run with --run.name."
            ) from None
        else:
            return folder
    raise AssertionError("there is always another suffix")


def _folders(root: str, name: str) -> Iterator[Path]:
    stem = re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "run"
    return (Path(root) / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
