"""Logging setup, with INFO on rank 0 only and WARNING on all replicas."""

import logging
import sys
from collections import deque

ON_STDOUT = {"on_stdout": True}
"""`extra` of a record whose text is already on standard output: it goes to log files only."""


def set_up_logging(replica_id: int) -> None:
    """Configure the `dreplica` logger to write to standard error.

    Rank 0 also keeps its records for `log.txt`, since the run folder is opened only when there is something to record.
    """
    logger = logging.getLogger("dreplica")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(replica_id))
    handler.addFilter(lambda record: not getattr(record, "on_stdout", False))
    logger.addHandler(handler)
    if replica_id == 0:
        logger.addHandler(RecentRecords())
    logger.setLevel(logging.INFO if replica_id == 0 else logging.WARNING)
    logger.propagate = False


class RecentRecords(logging.Handler):
    """A handler that keeps the newest records, for a log file that is opened later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.records.append(record)


class _Formatter(logging.Formatter):
    def __init__(self, replica_id: int) -> None:
        super().__init__()
        self._replica_id = replica_id

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()} [replica {self._replica_id}]: {text}"
