"""The folder for the run folders of a command that starts jobs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreplica.errors import UsageError


@contextmanager
def fresh_folder(keep: Path | None, command: str) -> Iterator[Path]:
    """Create the folder `keep`, or a temporary folder that is removed at the end.

    Args:
        keep: The folder to create or use. It must be empty, so that no user's file is overwritten.
        command: Name of the command, for the name of a temporary folder.

    Yields:
        The folder.

    Raises:
        UsageError: `keep` is not empty or cannot be created.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"dreplica-{command}-") as folder:
            yield Path(folder)
        return
    try:
        if keep.exists() and any(keep.iterdir()):
            raise UsageError(f"--keep: {str(keep)!r} is not empty. Use a new or empty folder.", code="folder-not-empty")
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--keep: {str(keep)!r} cannot be created ({error.strerror}). Use another folder.") from None
    yield keep.resolve()
