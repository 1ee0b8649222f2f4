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


def test_failure_of_a_value_that_contains_itself_is_finite() -> None:
    value: dict[str, object] = {"lr": 0.1}
    value["again"] = value
    failure = Failure.from_exception(UsageError("optim: invalid", key="optim", value=value))
    assert failure.fields["value"]["lr"] == 0.1
    assert len(json.dumps(failure.as_dict())) < 5000


def test_failure_bounds_texts_and_keeps_nested_errors() -> None:
    nested = UsageError("inner", code="inner-code", key="a")
    failure = Failure.from_exception(UsageError("outer", errors=[nested], model="x" * 10**6))
    assert failure.fields["errors"] == [{"text": "inner", "code": "inner-code", "fields": {"key": "a"}}]
    assert len(failure.fields["model"]) == 2000
