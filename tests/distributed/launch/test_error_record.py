"""The record of the error that ended a run as unusable."""

from pathlib import Path

import pytest

from dreplica.distributed.launch.error_record import ERROR_FILE, read_error, write_error
from dreplica.errors import UsageError


def test_error_is_read_with_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    write_error(UsageError("data.root: the folder is missing", code="missing", key="data.root", value=Path("a")))
    error = read_error(path)
    assert error is not None
    assert (str(error), error.code) == ("data.root: the folder is missing", "missing")
    assert error.fields == {"key": "data.root", "value": "a"}


def test_without_a_parent_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    write_error(UsageError("data.root: the folder is missing"))
    assert read_error(tmp_path / "error.json") is None
