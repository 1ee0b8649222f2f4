"""Exceptions carry data, also to other processes."""

import copy
import pickle

import pytest

from dreplica.errors import DreplicaError, SharedUsageError, UsageError


@pytest.mark.parametrize("duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("kind", [DreplicaError, UsageError, SharedUsageError])
def test_error_keeps_code_and_fields(kind: type[DreplicaError], duplicate: object) -> None:
    error = kind("data.root: no such folder", code="no-folder", key="data.root", value="x")
    other = duplicate(error)  # type: ignore[operator]
    assert type(other) is kind
    assert (str(other), other.code, other.fields) == (str(error), "no-folder", {"key": "data.root", "value": "x"})


def test_code_defaults_to_that_of_the_class() -> None:
    assert DreplicaError("text").code == "error"
    assert UsageError("text").code == "usage"
    assert isinstance(UsageError("text"), ValueError)
