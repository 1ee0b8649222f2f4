"""Exit codes of workers, passed to their launcher in files.

torchrun itself reports 1 for every failure.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = "DREPLICA_EXIT_CODES"


@contextmanager
def collect() -> Iterator[Callable[[], dict[int, int]]]:
    """Collect the exit codes of workers that are started in the body.

    Yields:
        A function that returns the codes reported so far, by local rank.
    """
    with tempfile.TemporaryDirectory(prefix="dreplica-exit-codes-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield lambda: {int(path.name): int(path.read_text()) for path in Path(folder).iterdir()}
        finally:
            del os.environ[_FOLDER]


def report(code: int) -> None:
    """Report the exit code of this worker to its launcher, if the launcher collects codes."""
    folder = os.environ.get(_FOLDER)
    if folder is not None and Path(folder).is_dir():
        (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(str(code))
