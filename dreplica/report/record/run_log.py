"""`log.txt` in the run folder: every log record of rank 0, with its time."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from dreplica.distributed.log_setup import RecentRecords

LOG_NAME = "log.txt"


class RunLog(logging.FileHandler):
    """The log file of a run, appended to by a resumed run.

    Records of this process from before the run folder was opened are written first. A failure to write disables the
    file with one warning, and does not end the run.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOG_NAME, mode="a", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        self._logger = logging.getLogger("dreplica")
        for handler in [each for each in self._logger.handlers if isinstance(each, RecentRecords)]:
            self._logger.removeHandler(handler)
            for record in handler.records:
                self.handle(record)
        self._logger.addHandler(self)

    def handleError(self, record: logging.LogRecord) -> None:
        """Disable the file after an error, such as a full disk."""
        self._logger.removeHandler(self)
        self._logger.warning("%s: disabled after an error: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        """Close the file, for a process that continues with another run."""
        self._logger.removeHandler(self)
        with suppress(OSError):  # a full disk: what was buffered is lost
            super().close()
