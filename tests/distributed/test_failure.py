"""Exceptions as data that other replicas can read."""

import json
from pathlib import Path

from dreplica.distributed.failure import Failure, describe_exception
from dreplica.errors import UsageError


def test_failure_keeps_code_and_fields() -> None:
    error = UsageError("data.root: no folder", code="missing", path=Path("/a"), sizes=(1, 2), by_rank={1: None})
    failure = Failure.from_exception(error)
    assert (failure.kind, failure.message, failure.code) == ("UsageError", "data.root: no folder", "missing")
    assert failure.fields == {"path": "/a", "sizes": [1, 2], "by_rank": {"1": None}}
    assert Failure.from_dict(json.loads(json.dumps(failure.as_dict()))) == failure


def test_failure_of_another_exception_has_no_code() -> None:
    assert Failure.from_exception(ArithmeticError("it fell")) == Failure("ArithmeticError", "it fell")


def test_describe_exception_omits_an_empty_message() -> None:
    assert describe_exception(ArithmeticError("it fell")) == "ArithmeticError: it fell"
    assert describe_exception(KeyboardInterrupt()) == "KeyboardInterrupt"
