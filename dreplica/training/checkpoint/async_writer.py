"""Asynchronous writing of checkpoints, while training continues."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from dreplica.training.checkpoint.file_format import (
    checkpoint_name,
    flush,
    parse,
    prune_checkpoints,
    read_files,
    write_checkpoint,
)
from dreplica.training.checkpoint.replica_state import StateCopy

log = logging.getLogger(__name__)


class Saver:
    """Writer of a run's checkpoints, one at a time, in a background thread.

    Training waits only if the previous checkpoint is still being written. A checkpoint that cannot be written, for
    instance because the disk is full, is logged as a warning; training continues and the previous one is kept.

    Args:
        folder: The run's `checkpoints` folder.
        keep: Number of checkpoints to keep.
        part: Folder within each checkpoint that this replica writes. None if one copy is shared by all replicas.
        records: Files that a checkpoint refers to, which are flushed to the disk before it.

    Attributes:
        failures: One line for each checkpoint that could not be written.
        newest_failed: True if the newest checkpoint is one of them.
        unusable: Names of checkpoints that cannot be restored. They do not count among those to keep.
    """

    def __init__(self, folder: Path, keep: int, part: str | None = None, records: Sequence[Path] = ()) -> None:
        self.failures: list[str] = []
        self.newest_failed = False
        self.unusable: set[str] = set()
        self._records = records
        self._folder, self._keep, self._part = folder, keep, part
        self._thread: threading.Thread | None = None
        self._proved = False

    def save(self, copied: StateCopy) -> None:
        """Start to write a checkpoint, and remove old ones.

        All replicas have waited for the previous checkpoint, so older ones are no longer needed.
        """
        self.wait()
        self.prune()
        self._thread = threading.Thread(target=self._write, args=(copied,), name="dreplica-saver")
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def prune(self) -> None:
        """Remove the checkpoints beyond the number to keep."""
        try:
            prune_checkpoints(self._folder, self._keep, self._part, self.unusable)
        except OSError as error:
            log.warning("cannot remove old checkpoints: %s", error)

    def _write(self, copied: StateCopy) -> None:
        step = copied.state["step"]
        self.newest_failed = True
        place = self._folder / checkpoint_name(step)
        try:
            for record in self._records:
                if record.exists():
                    flush(record)
            write_checkpoint(place if self._part is None else place / self._part, copied.contents())
            if not self._proved:
                # An optimizer may keep objects that cannot be loaded without executing code.
                self.unusable.add(place.name)
                parse(read_files(place if self._part is None else place / self._part))
                self._proved = True
            self.unusable.discard(place.name)
            self.newest_failed = False
        except Exception as error:
            # Any error must reach the run's report, instead of ending as a traceback in a thread.
            self.failures.append(f"cannot write the checkpoint at step {step}: {type(error).__name__}: {error}")
            log.warning("%s. Training continues.", self.failures[-1])
