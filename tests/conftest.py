"""What one test sets for the whole process is put back for the next."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when imported, for its own functions


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """A run configures the `dreplica` logger of its process."""
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
