"""Which replicas log from which level."""

import logging

import pytest

from dreplica.distributed.log_setup import set_up_logging


@pytest.mark.parametrize(
    ("replica_id", "printed"), [(0, "news\nwarning [replica 0]: careful\n"), (3, "warning [replica 3]: careful\n")]
)
def test_only_rank_0_logs_below_warning(capsys: pytest.CaptureFixture[str], replica_id: int, printed: str) -> None:
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        set_up_logging(replica_id)
        set_up_logging(replica_id)  # a second call does not duplicate lines
        logging.getLogger("dreplica.world.something").info("news")
        logging.getLogger("dreplica.world.something").warning("careful")
        logging.getLogger("dreplica.world.something").debug("details")
    finally:
        logger.handlers[:], level, logger.propagate = before
        logger.setLevel(level)
    captured = capsys.readouterr()
    assert captured.err == printed
    assert captured.out == ""
