"""Determinism settings: each key changes its own flags only, and the flags are read from torch."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dreplica.config.schema import DeterminismConfig
from dreplica.environment import determinism
from dreplica.environment.determinism import (
    apply_determinism,
    environment_at_start,
    fp32_precision,
    numerics_flags,
    set_environment,
)


@pytest.fixture(autouse=True)
def _restore_flags() -> Iterator[None]:
    before, default_dtype = numerics_flags(), torch.get_default_dtype()
    workspace = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    torch.set_default_dtype(default_dtype)
    torch.set_flush_denormal(before["flush_denormal"])
    torch.use_deterministic_algorithms(before["deterministic_algorithms"], warn_only=before["deterministic_warn_only"])
    torch.utils.deterministic.fill_uninitialized_memory = before["fill_uninitialized_memory"]  # type: ignore[attr-defined]
    torch.set_num_threads(before["threads"])
    torch.backends.cudnn.benchmark = before["cudnn_benchmark"]
    torch.backends.cudnn.deterministic = before["cudnn_deterministic"]
    _reset_fp32_precision()
    torch.backends.cudnn.allow_tf32 = before["cudnn_tf32"]
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = before["matmul_tf32"]
    torch.set_float32_matmul_precision(before["float32_matmul_precision"])
    matmul.allow_fp16_reduced_precision_reduction = before["matmul_fp16_reduced_precision"]
    matmul.allow_bf16_reduced_precision_reduction = before["matmul_bf16_reduced_precision"]
    torch.backends.mkldnn.enabled = before["onednn"]  # type: ignore[assignment]
    assert numerics_flags() == before


def _reset_fp32_precision() -> None:
    backends: Any = torch.backends
    for kind in (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
        kind.fp32_precision = "none"
    for kind in (backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn):
        kind.fp32_precision = "none"


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mode warn": ({"mode": "warn"}, {"deterministic_warn_only": True}),
    "mode off": (
        {"mode": "off"},
        {"deterministic_algorithms": False, "cudnn_deterministic": False, "cublas_workspace_config": None},
    ),
    "threads": ({"threads": 2}, {"threads": 2}),
    "cudnn_benchmark": ({"cudnn_benchmark": True}, {"cudnn_benchmark": True}),
    "cudnn_deterministic": ({"cudnn_deterministic": False}, {"cudnn_deterministic": False}),
    "tf32": (
        {"tf32": True},
        {"cudnn_tf32": True, "matmul_tf32": True, "float32_matmul_precision": "high"}
        | {f"{kind}_fp32_precision": "tf32" for kind in ("cuda_matmul", "cudnn_conv", "cudnn_rnn")},
    ),
    "reduced_precision_reduction": (
        {"reduced_precision_reduction": True},
        {"matmul_fp16_reduced_precision": True, "matmul_bf16_reduced_precision": True},
    ),
    "onednn": ({"onednn": False}, {"onednn": False}),
    "fill_uninitialized_memory": ({"fill_uninitialized_memory": False}, {"fill_uninitialized_memory": False}),
    "cublas_workspace_config": ({"cublas_workspace_config": ":16:8"}, {"cublas_workspace_config": ":16:8"}),
    "no cublas_workspace_config": ({"cublas_workspace_config": None}, {"cublas_workspace_config": None}),
}


def flags_under(config: DeterminismConfig) -> dict[str, Any]:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    set_environment(config)
    apply_determinism(config)
    return numerics_flags()


@pytest.mark.parametrize(("given", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_key_changes_only_its_own_flags(given: dict[str, Any], expected: dict[str, Any]) -> None:
    usual = flags_under(DeterminismConfig())
    changed = flags_under(DeterminismConfig(**given))
    assert {name: value for name, value in changed.items() if value != usual[name]} == expected
    assert flags_under(DeterminismConfig()) == usual


def test_every_key_is_tested() -> None:
    assert {key for given, _ in CHANGES.values() for key in given} == set(DeterminismConfig.model_fields)


def test_strict_mode_sets_the_mode_of_torch() -> None:
    apply_determinism(DeterminismConfig())
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.empty(3).isnan().all()  # uninitialized memory is filled
    apply_determinism(DeterminismConfig(mode="off"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_numerics_flags_reports_flags_set_elsewhere() -> None:
    apply_determinism(DeterminismConfig())
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    flushes = torch.set_flush_denormal(True)
    flags = numerics_flags()
    assert (flags["threads"], flags["default_dtype"], flags["flush_denormal"]) == (2, "torch.float64", flushes)


@pytest.mark.parametrize(("present", "is_wrong"), [(":16:8", False), (":0:0", True), ("", True)])
@pytest.mark.parametrize("mode", ["strict", "warn", "off"])
@pytest.mark.parametrize("started", [False, True])
def test_workspace_config_of_the_user_is_kept(
    monkeypatch: pytest.MonkeyPatch, present: str, is_wrong: bool, mode: Any, started: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", present)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(determinism, "environment_at_start", lambda: {"CUBLAS_WORKSPACE_CONFIG"})
    problem = set_environment(DeterminismConfig(mode=mode))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == present
    assert (problem is not None) == (is_wrong and mode != "off")
    assert problem is None or f"CUBLAS_WORKSPACE_CONFIG={present} in the environment" in problem
    assert problem is None or "Unset CUBLAS_WORKSPACE_CONFIG" in problem


@pytest.mark.parametrize("mode", ["strict", "warn", "off"])
def test_workspace_config_is_not_set_after_cuda_start(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    problem = set_environment(DeterminismConfig(mode=mode))
    assert numerics_flags()["cublas_workspace_config"] is None
    assert (problem is not None) == (mode != "off")
    assert problem is None or "an imported module has started CUDA" in problem
    assert problem is None or "Export CUBLAS_WORKSPACE_CONFIG=:4096:8" in problem


def test_workspace_config_set_inside_the_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert set_environment(DeterminismConfig()) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "inside this process" in str(set_environment(DeterminismConfig()))


@pytest.mark.parametrize(("wanted", "text"), [(None, "null"), (":4096:2", "':4096:2'")])
def test_nondeterministic_workspace_in_config_is_reported(wanted: str | None, text: str) -> None:
    problem = set_environment(DeterminismConfig(cublas_workspace_config=wanted))
    assert str(problem).startswith(f"determinism.cublas_workspace_config: {text} leaves cuBLAS nondeterministic")
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == wanted


def test_environment_at_start_omits_later_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREPLICA_SET_LATER", "1")
    assert "PATH" in environment_at_start()
    assert "DREPLICA_SET_LATER" not in environment_at_start()


@pytest.mark.parametrize(
    ("backend", "value", "changed"),
    [
        ("mkldnn.conv", "bf16", {"onednn_conv_fp32_precision": "bf16"}),
        ("mkldnn.matmul", "bf16", {"onednn_matmul_fp32_precision": "bf16"}),
        ("cudnn.conv", "tf32", {"cudnn_conv_fp32_precision": "tf32", "cudnn_tf32": True}),
        ("cuda.matmul", "tf32", {"cuda_matmul_fp32_precision": "tf32", "matmul_tf32": True}),
    ],
)
def test_newer_precision_flags_are_reported(backend: str, value: str, changed: dict[str, Any]) -> None:
    apply_determinism(DeterminismConfig())
    usual = numerics_flags()
    library, operation = backend.split(".")
    getattr(getattr(torch.backends, library), operation).fp32_precision = value
    flags = numerics_flags()
    assert {name: flags[name] for name in changed} == changed
    others = set(changed) | {"float32_matmul_precision"}  # which torch cannot read once the newer flags were used
    assert {name for name in flags if flags[name] != usual[name]} <= others
    apply_determinism(DeterminismConfig())


def test_global_precision_is_reported_for_each_operation() -> None:
    apply_determinism(DeterminismConfig())
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    precision = fp32_precision()
    assert precision["cudnn.conv"] == precision["onednn.conv"] == "tf32"
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    assert set(fp32_precision().values()) == {"ieee"}
