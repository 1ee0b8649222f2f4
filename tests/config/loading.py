"""Helpers for tests that load a config from text."""

from pathlib import Path

import pytest

from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError


def load(tmp_path: Path, text: str, *arguments: str, num_replicas: int = 2) -> RunConfig:
    """Load the config of a YAML file with `text` and of command-line arguments."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config([f"--config={path}", *arguments], num_replicas)


def refusal(tmp_path: Path, text: str, *arguments: str, num_replicas: int = 2) -> UsageError:
    """Return the error of an invalid config, whose text must not show internals of pydantic or Python."""
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *arguments, num_replicas=num_replicas)
    message = message_of(caught.value, tmp_path)
    assert not message.endswith("..")
    for inside in ("constrained", "[int]", "literal[", "Section", "Config", "pydantic", "Traceback", "Errno"):
        assert inside not in message
    return caught.value


def message_of(error: UsageError, tmp_path: Path) -> str:
    return str(error).replace(f"{tmp_path}/", "")
