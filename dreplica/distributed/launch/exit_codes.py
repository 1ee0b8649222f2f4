"""How a launcher learns with what code each of its workers ended: torchrun's own has but 1 for all of them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = "DREPLICA_EXIT_CODES"


@contextmanager
def collect() -> Iterator[Callable[[], dict[int, int]]]:
    """Workers that are started inside leave their codes; yields what returns those left so far, by local rank."""
    with tempfile.TemporaryDirectory(prefix="dreplica-exit-codes-") as folder:
        os.environ[_FOLDER] = folder
        try:
            yield lambda: {int(path.name): int(path.read_text()) for path in Path(folder).iterdir()}
        finally:
            del os.environ[_FOLDER]


def leave(code: int) -> None:
    """Tells the launcher of this worker, if it collects them, with what code this process is about to end."""
    folder = os.environ.get(_FOLDER)
    if folder is not None and Path(folder).is_dir():
        (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(str(code))
