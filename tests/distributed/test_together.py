"""Errors of one replica, raised on all of them."""

import pytest

from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.distributed.together import together
from dreplica.errors import SharedUsageError, UsageError
from tests.harness import run_replicas


def _fail(world: World, failing: list[int]) -> int:
    def action() -> int:
        if world.replica_id in failing:
            raise UsageError(f"wrong on {len(failing)}", code="wrong", key=world.replica_id)
        return world.replica_id

    return together(world.channel, action)


def test_together_returns_own_results() -> None:
    assert run_replicas(_fail, 3, []) == [0, 1, 2]


def test_together_raises_the_first_error_on_all() -> None:
    errors = run_replicas(_fail, 3, [1, 2])
    assert [type(error) for error in errors] == [SharedUsageError] * 3
    assert {str(error) for error in errors} == {"replica 1: wrong on 2"}
    assert [(error.code, error.fields) for error in errors] == [("wrong", {"key": 1, "replicas": [1, 2]})] * 3


def test_together_leaves_out_the_replica_if_all_fail() -> None:
    assert {str(error) for error in run_replicas(_fail, 2, [0, 1])} == {"wrong on 2"}


def test_together_passes_other_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        together(Channel(), lambda: 1 // 0)
