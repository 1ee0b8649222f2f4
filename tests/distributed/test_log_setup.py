"""Who is heard."""

import logging

import pytest

from dreplica.distributed.log_setup import set_up_logging


@pytest.mark.parametrize(
    ("replica_id", "heard"), [(0, "news\nwarning [replica 0]: careful\n"), (3, "warning [replica 3]: careful\n")]
)
def test_rank_0_informs_and_all_warn_with_their_id(
    capsys: pytest.CaptureFixture[str], replica_id: int, heard: str
) -> None:
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        set_up_logging(replica_id)
        set_up_logging(replica_id)  # again, as in a process that runs twice: still heard once
        logging.getLogger("dreplica.world.something").info("news")
        logging.getLogger("dreplica.world.something").warning("careful")
        logging.getLogger("dreplica.world.something").debug("details")
    finally:
        logger.handlers[:], level, logger.propagate = before
        logger.setLevel(level)
    captured = capsys.readouterr()
    assert captured.err == heard
    assert captured.out == ""
