"""JSON files: complete or unchanged, and valid for every parser."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace import json_file
from dreplica.agreement.trace.json_file import write_json


def strictly(text: str) -> Any:
    """Parse JSON, refusing NaN and Infinity, which are not JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_write_json_replaces_nonfinite_by_null(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"a": [1.5, float("nan")], "b": {"c": float("inf")}, "d": (1, -float("inf"))})
    assert strictly((tmp_path / "report.json").read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": [1, None]}


def test_write_json_on_full_disk_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "report.json", {"old": True})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json_file.json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "report.json", {"new": True})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": True}
