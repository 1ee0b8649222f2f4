"""What one test sets for the whole process is put back for the next."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """A run configures the `dreplica` logger of its process."""
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
