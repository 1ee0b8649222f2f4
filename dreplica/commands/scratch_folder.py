"""A folder for what a command that starts jobs leaves behind."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreplica.errors import UsageError


@contextmanager
def fresh_folder(keep: Path | None, command: str) -> Iterator[Path]:
    """`keep`, made if need be, whose content stays; without it one that is removed in the end.

    Raises UsageError for one that is not empty or cannot be made: what is there may be somebody's.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=f"dreplica-{command}-") as folder:
            yield Path(folder)
        return
    try:
        if keep.exists() and any(keep.iterdir()):
            raise UsageError(f"--keep: {str(keep)!r} is not empty. Name a fresh folder.")
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--keep: {str(keep)!r} cannot be made ({error.strerror}). Name another folder.") from None
    yield keep.resolve()
