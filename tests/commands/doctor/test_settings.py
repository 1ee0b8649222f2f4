"""Variables and flags as the environment leaves them."""

import os
from typing import Any

import pytest
import torch

from dreplica.commands.doctor.check import Check
from dreplica.commands.doctor.settings import check_hashes, check_settings
from dreplica.environment.determinism import numerics_flags
from dreplica.environment.device import Device
from dreplica.environment.manifest import collect_manifest
from tests.environment.test_manifest import WORLD


def _found(gpu: bool = True, cuda_started: bool = False, **numerics: Any) -> dict[str, Check]:
    manifest = collect_manifest(WORLD, Device(torch.device("cpu")), None, "")
    manifest["numerics"] |= numerics
    return {check.name: check for check in check_settings(manifest, gpu, cuda_started)}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("TORCHINDUCTOR_", "CUBLAS", "CUDA_LAUNCH", "MKL_", "NVIDIA_TF32")):
            monkeypatch.delenv(name)


def test_versions_are_reported() -> None:
    seen = _found()["versions"].seen
    assert f"torch {torch.__version__}" in seen
    assert torch.backends.cpu.get_cpu_capability() in seen


@pytest.mark.parametrize(
    ("value", "gpu", "cuda_started", "status"),
    [
        (None, False, False, "ok"),
        (None, True, False, "warn"),
        (":4096:8", True, False, "ok"),
        (":16:8", True, False, "ok"),
        (":4096:2", True, False, "bad"),
        (":4096:2", False, False, "warn"),
        (":4096:8", True, True, "bad"),  # pytest's process was not started with it
    ],
)
def test_cublas(value: str | None, gpu: bool, cuda_started: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    check = _found(gpu, cuda_started)["CUBLAS_WORKSPACE_CONFIG"]
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


def test_workspace_set_at_process_start_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("dreplica.commands.doctor.settings.environment_at_start", lambda: set(os.environ))
    assert _found(True, True)["CUBLAS_WORKSPACE_CONFIG"].status == "ok"


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ({"deterministic_algorithms": False}, "warn", "not required"),
        ({"deterministic_algorithms": True, "deterministic_warn_only": True}, "warn", "only warned about"),
        ({"deterministic_algorithms": True, "cudnn_benchmark": True}, "warn", "cuDNN times its algorithms"),
        ({"deterministic_algorithms": True}, "ok", "required from the start"),
    ],
)
def test_deterministic_algorithms(flags: dict[str, Any], status: str, words: str) -> None:
    off = {"deterministic_warn_only": False, "cudnn_benchmark": False}
    check = _found(**(off | flags))["deterministic algorithms"]
    assert check.status == status
    assert words in check.seen


def test_reduced_precision_warns_only_if_used() -> None:
    full = {name: "ieee" for name in numerics_flags() if name.endswith("_fp32_precision")}
    tf32 = full | {"cuda_matmul_fp32_precision": "tf32"}
    assert _found(**full)["float32 precision"].status == "ok"
    assert _found(**tf32)["float32 precision"].status == "warn"
    assert _found(gpu=False, **tf32)["float32 precision"].status == "ok"
    bf16 = full | {"onednn_conv_fp32_precision": "bf16"}
    assert _found(gpu=False, **bf16)["float32 precision"].status == "warn"


@pytest.mark.parametrize(
    ("name", "value", "check", "status"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", "library variables", "warn"),
        ("MKL_CBWR", "AVX2", "library variables", "warn"),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1", "torch.compile", "warn"),
        ("TORCHINDUCTOR_FREEZING", "1", "torch.compile", "ok"),
        ("CUDA_LAUNCH_BLOCKING", "1", "CUDA_LAUNCH_BLOCKING", "warn"),
        ("CUDA_LAUNCH_BLOCKING", "0", "CUDA_LAUNCH_BLOCKING", "ok"),
    ],
)
def test_variables(name: str, value: str, check: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _found()[check].status == "ok"
    monkeypatch.setenv(name, value)
    found = _found()[check]
    assert found.status == status
    assert value in found.seen
    assert (f"unset {name}" in " ".join(found.remedy)) == (status != "ok")


def test_deterministic_inductor_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")
    assert _found()["torch.compile"].status == "ok"


def test_hashes() -> None:
    assert check_hashes([7, 7]).status == "ok"
    assert check_hashes([7, 8]).status == "warn"
