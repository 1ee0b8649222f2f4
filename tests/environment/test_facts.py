"""What is recorded of a process: packages, driver, and dreplica's own code."""

import ctypes
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.config.paths import PACKAGE_ROOT
from dreplica.environment import facts as facts_module
from dreplica.environment.facts import collect_environment, describe_device, source_digest


def test_environment_is_json_without_arguments_of_a_trainer() -> None:
    found = collect_environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert (found["host"], found["seed"], found["device"]["type"]) == (socket.gethostname(), None, "cpu")
    assert set(found) >= {"argv", "script", "commit", "distributions", "variables", "packages", "numerics", "code"}
    assert found["distributions"]["torch"] == found["packages"]["torch"] == torch.__version__
    assert collect_environment(torch.device("cpu"), 7)["seed"] == 7


@pytest.mark.parametrize("kind", ["meta", "mps", "xpu"])
def test_other_devices_are_named(kind: str) -> None:
    assert describe_device(torch.device(kind)) == {"type": kind, "name": kind}


def test_source_digest_covers_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere" / "dreplica"
    shutil.copytree(PACKAGE_ROOT, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(facts_module, "PACKAGE_ROOT", copied)
    first = source_digest.__wrapped__()
    assert len(first) == 32
    assert source_digest.__wrapped__() == first
    file = copied / "training" / "step.py"
    file.write_text(file.read_text() + "#")
    second = source_digest.__wrapped__()
    assert second != first
    file.rename(file.with_name("steps.py"))
    assert source_digest.__wrapped__() not in {first, second}


class _Nvml:
    """A fake of NVIDIA's management library."""

    def __init__(self, _: str, starts: int = 0) -> None:
        self.starts = starts

    def nvmlInit_v2(self) -> int:
        return self.starts

    def nvmlSystemGetDriverVersion(self, buffer: Any, _: Any) -> int:
        buffer.value = b"570.86.15"
        return 0

    def nvmlShutdown(self) -> int:
        return 0


def _not_found(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError


def test_driver_version_falls_back_to_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _not_found)
    monkeypatch.setattr(ctypes, "CDLL", _Nvml)
    assert facts_module._driver_version.__wrapped__() == "570.86.15"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Nvml(name, starts=999))
    assert facts_module._driver_version.__wrapped__() is None
    monkeypatch.setattr(ctypes, "CDLL", _not_found)
    assert facts_module._driver_version.__wrapped__() is None
