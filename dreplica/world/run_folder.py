"""The folder of one run: picked once, by rank 0."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import field_validator

from dreplica.errors import UsageError
from dreplica.section import Lockstep, Section


class RunFolderConfig(Section):
    """Where a run leaves its files."""

    name: Annotated[str | None, Lockstep()] = None
    """The run's name; null: the config file's. A second run of the same name gets a suffix."""
    root: Annotated[str, Lockstep()] = "runs"
    """The folder that holds the run folders."""

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        if not root.strip():
            raise UsageError(f"run.root: {root!r} names no folder. Name one, or '.' for the current folder.")
        return root


def create_run_folder(root: str, name: str) -> Path:
    """Makes `root`/`name`, or with a suffix (-2, -3, …) where that is taken; atomic, so two runs never share one.

    Raises UsageError where it cannot be made.
    """
    stem = re.sub(r"[^\w.+=-]+", "_", name).strip("._") or "run"
    number = 1
    while True:
        folder = Path(root) / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not folder.parent.is_dir():
                raise UsageError(f"run.root: {root!r} is a file. Name a folder with --run.root.") from None
            number += 1
        except OSError as error:
            raise UsageError(
                f"run.root: the run folder {str(folder)!r} cannot be made ({error.strerror}). "
                "Name a folder that you can write to with --run.root, or another run with --run.name."
            ) from None
        else:
            return folder
