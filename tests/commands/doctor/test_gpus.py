"""Checks of GPUs, with a script in place of nvidia-smi that prints what the real one prints."""

from pathlib import Path

import pytest
import torch

from dreplica.commands.doctor.check import Check
from dreplica.commands.doctor.gpus import check_gpus

pytestmark = pytest.mark.process

_FINE = "0, NVIDIA H100 80GB HBM3, 550.54.15, Disabled, Enabled, 0, 0"
_CORRECTED = "1, NVIDIA H100 80GB HBM3, 550.54.15, Disabled, Enabled, 4, 0"
_UNCORRECTED = "1, NVIDIA H100 80GB HBM3, 550.54.15, Disabled, Enabled, 4, 2"
_SLICED = "0, NVIDIA H100 80GB HBM3, 550.54.15, Enabled, Enabled, 0, 0"
_CONSUMER = "0, NVIDIA GeForce RTX 4090, 550.54.15, [N/A], [N/A], [N/A], [N/A]"


def _check(
    monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], lines: list[str], code: int = 0
) -> dict[str, Check]:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    return {check.name: check for check in check_gpus()}


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        ([_FINE], "ok", "0 corrected, 0 uncorrected"),
        ([_FINE, _CORRECTED], "warn", "4 on GPU 1 corrected, 0 uncorrected"),
        ([_FINE, _UNCORRECTED], "bad", "2 on GPU 1 uncorrected"),
        ([_CONSUMER], "warn", "ECC is not on for GPU 0"),
    ],
)
def test_memory_errors(
    lines: list[str], status: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = _check(monkeypatch, tmp_path, ["H100"] * len(lines), lines)["GPU memory errors"]
    assert check.status == status
    assert words in check.seen


def test_mig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _check(monkeypatch, tmp_path, ["H100"], [_FINE])["MIG"].status == "ok"
    check = _check(monkeypatch, tmp_path, ["H100 MIG 1g.10gb"], [_SLICED])["MIG"]
    assert (check.status, check.seen) == ("warn", "on for GPU 0")


def test_mixed_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = _check(monkeypatch, tmp_path, ["H100", "H100"], [_FINE])["GPUs"]
    assert (same.status, same.seen) == ("ok", "2 x H100")
    mixed = _check(monkeypatch, tmp_path, ["H100", "A100", "H100"], [_FINE])["GPUs"]
    assert (mixed.status, mixed.seen) == ("warn", "2 x H100, 1 x A100")


def test_machine_without_gpu_is_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (check,) = check_gpus()
    assert check.status == "ok"
    assert "replicas run on the CPU" in check.seen


def test_gpu_that_torch_does_not_see_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = _check(monkeypatch, tmp_path, [], [_FINE])
    assert found["GPUs"].status == "warn"
    assert "550.54.15" in found["GPUs"].seen


def test_failing_nvidia_smi_gives_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch"
    found = _check(monkeypatch, tmp_path, ["H100"], [said], code=18)
    assert found["GPU memory errors"].status == found["MIG"].status == "unknown"
    assert said in found["MIG"].seen
