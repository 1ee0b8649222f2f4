"""Logging setup, with INFO on rank 0 only and WARNING on all replicas."""

import logging
import sys


def set_up_logging(replica_id: int) -> None:
    """Configure the `dreplica` logger to write to standard error."""
    logger = logging.getLogger("dreplica")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(replica_id))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if replica_id == 0 else logging.WARNING)
    logger.propagate = False


class _Formatter(logging.Formatter):
    def __init__(self, replica_id: int) -> None:
        super().__init__()
        self._replica_id = replica_id

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()} [replica {self._replica_id}]: {text}"
