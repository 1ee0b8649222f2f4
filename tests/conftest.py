"""Process-wide settings, restored after each test."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(autouse=True)
def restore_logger() -> Iterator[None]:
    """Restore the `dreplica` logger, which a run configures."""
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
