"""Create, find and lock run folders, on rank 0."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from dreplica.errors import UsageError


def newest_run_folder(root: str, name: str) -> Path | None:
    """Return the folder of the newest run with this name, or None if there is none."""
    folders = [*itertools.takewhile(Path.is_dir, _folders(root, name))]
    return folders[-1] if folders else None


def create_run_folder(root: str, name: str) -> Path:
    """Create the folder `root`/`name`, with a suffix (-2, -3, …) if it exists.

    Creation is atomic: two runs never share a folder.

    Raises:
        UsageError: The folder cannot be created.
    """
    for folder in _folders(root, name):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not folder.parent.is_dir():
                raise UsageError(
                    f"run.root: expected a folder, got the file {root!r}. Pass a folder with --run.root.",
                    code="not-a-folder",
                    key="run.root",
                    value=root,
                ) from None
        except OSError as error:
            raise UsageError(
                f"run.root: the run folder {str(folder)!r} cannot be created: {error.strerror}. "
                "Pass a writable folder with --run.root, or another name with --run.name.",
                code="cannot-create",
                key="run.root",
                value=root,
            ) from None
        else:
            return folder
    raise AssertionError("unreachable: suffixes never end")


def _folders(root: str, name: str) -> Iterator[Path]:
    stem = re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "run"
    return (Path(root) / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
