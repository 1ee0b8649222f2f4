"""Local work that may fail on one replica."""

from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.failure import Failure
from dreplica.distributed.process_group import World
from tests.harness import run_replicas


def fail_on(world: World, failing: list[int]) -> object:
    def action() -> int:
        if world.replica_id in failing:
            raise OSError("the disk is gone")
        return 10 * world.replica_id

    try:
        return attempt(world.channel, action)
    except AttemptFailed as error:
        return str(error), error.failures


def test_attempt_returns_each_replicas_result() -> None:
    assert run_replicas(fail_on, 2, []) == [0, 10]


def test_attempt_raises_all_failures_on_all_replicas() -> None:
    text = "replica 0 raised OSError: the disk is gone; replica 2 raised OSError: the disk is gone"
    failure = Failure("OSError", "the disk is gone")
    assert run_replicas(fail_on, 3, [0, 2]) == [(text, {0: failure, 2: failure})] * 3
