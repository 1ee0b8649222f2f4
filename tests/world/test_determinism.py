"""Every flag takes effect on its own, and is reported as torch has it."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dreplica.world.determinism import (
    DeterminismConfig,
    apply_determinism,
    fp32_precision,
    numerics_flags,
    set_environment,
)


@pytest.fixture(autouse=True)
def _flags_as_before() -> Iterator[None]:
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
def test_a_key_changes_its_own_flags_and_no_other(given: dict[str, Any], expected: dict[str, Any]) -> None:
    usual = flags_under(DeterminismConfig())
    changed = flags_under(DeterminismConfig(**given))
    assert {name: value for name, value in changed.items() if value != usual[name]} == expected
    assert flags_under(DeterminismConfig()) == usual


def test_every_key_is_tested() -> None:
    assert {key for given, _ in CHANGES.values() for key in given} == set(DeterminismConfig.model_fields)


def test_strict_mode_makes_an_operator_without_a_deterministic_implementation_raise() -> None:
    apply_determinism(DeterminismConfig())
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.empty(3).isnan().all()  # uninitialised memory is filled
    apply_determinism(DeterminismConfig(mode="off"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_flags_set_by_others_are_reported() -> None:
    apply_determinism(DeterminismConfig())
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    flushes = torch.set_flush_denormal(True)
    flags = numerics_flags()
    assert (flags["threads"], flags["default_dtype"], flags["flush_denormal"]) == (2, "torch.float64", flushes)


@pytest.mark.parametrize(("present", "warns"), [(":16:8", False), (":0:0", True)])
def test_a_users_own_workspace_config_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, present: str, warns: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", present)
    monkeypatch.setattr(logging.getLogger("dreplica"), "propagate", True)
    set_environment(DeterminismConfig())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == present
    assert [present in record.getMessage() for record in caplog.records] == [True] * warns


@pytest.mark.parametrize(
    ("backend", "value", "changed"),
    [
        ("mkldnn.conv", "bf16", {"onednn_conv_fp32_precision": "bf16"}),
        ("mkldnn.matmul", "bf16", {"onednn_matmul_fp32_precision": "bf16"}),
        ("cudnn.conv", "tf32", {"cudnn_conv_fp32_precision": "tf32", "cudnn_tf32": True}),
        ("cuda.matmul", "tf32", {"cuda_matmul_fp32_precision": "tf32", "matmul_tf32": True}),
    ],
)
def test_the_newer_precision_flags_are_reported_and_do_not_make_the_older_ones_raise(
    backend: str, value: str, changed: dict[str, Any]
) -> None:
    apply_determinism(DeterminismConfig())
    usual = numerics_flags()
    library, operation = backend.split(".")
    getattr(getattr(torch.backends, library), operation).fp32_precision = value
    flags = numerics_flags()
    assert {name: flags[name] for name in changed} == changed
    others = set(changed) | {"float32_matmul_precision"}  # of which torch says that it cannot tell
    assert {name for name in flags if flags[name] != usual[name]} <= others
    apply_determinism(DeterminismConfig())


def test_a_precision_for_everything_is_reported_for_each() -> None:
    apply_determinism(DeterminismConfig())
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    precision = fp32_precision()
    assert precision["cudnn.conv"] == precision["onednn.conv"] == "tf32"
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    assert set(fp32_precision().values()) == {"ieee"}
