"""Writes checkpoints while training goes on."""

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
    """Writes the checkpoints of one run, one at a time, in a thread of its own.

    Training waits only where the one before is still being written. One that cannot be written (a full disk) is warned
    of, and training goes on: the one before is kept.

    Args:
        folder: where checkpoints go: the run's `checkpoints`.
        keep: how many.
        part: the folder within each that this replica writes; None where one copy is for all.
        records: files that each checkpoint refers to: on the disk before it is.

    Attributes:
        failures: what could not be written, a line each.
        newest_failed: whether the newest checkpoint was among it.
        unusable: names of checkpoints that cannot be gone on from: they do not count among those to keep.
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
        """Begins to write. All replicas have waited for the checkpoint before, which is why older ones may go now."""
        self.wait()
        self.prune()
        self._thread = threading.Thread(target=self._write, args=(copied,), name="dreplica-saver")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def prune(self) -> None:
        """Removes the checkpoints that are not to be kept."""
        try:
            prune_checkpoints(self._folder, self._keep, self._part, self.unusable)
        except OSError as error:
            log.warning("older checkpoints could not be removed: %s", error)

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
                # An optimizer may keep what is only code to a reader that executes none.
                self.unusable.add(place.name)
                parse(read_files(place if self._part is None else place / self._part))
                self._proved = True
            self.unusable.discard(place.name)
            self.newest_failed = False
        except Exception as error:
            # Whatever it is must reach the run's report, and not end as a traceback in a thread.
            self.failures.append(f"the checkpoint at step {step} could not be written: {type(error).__name__}: {error}")
            log.warning("%s; training goes on", self.failures[-1])
