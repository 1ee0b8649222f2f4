"""Manifests: recorded, compared, with differences allowed only where an override declares them."""

import copy
import ctypes
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.config.paths import PACKAGE_ROOT
from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.environment import manifest as manifest_module
from dreplica.environment.device import Device
from dreplica.environment.manifest import (
    card_of,
    collect_manifest,
    compare_manifests,
    compare_values,
    source_digest,
    spell_device,
)

WORLD = World(0, 1, Channel(), None, "a-host")


@pytest.fixture
def manifest() -> dict[str, Any]:
    return collect_manifest(WORLD, Device(torch.device("cpu")), 42, "0" * 32)


def changed(manifest: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    other = copy.deepcopy(dict(manifest))
    *sections, last = field.split(".")
    inner = other
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return other


def test_manifest_is_json_with_all_numerics_settings(manifest: dict[str, Any]) -> None:
    assert json.loads(json.dumps(manifest)) == manifest
    assert set(manifest) >= {"host", "seed", "code", "python", "packages", "cpu", "device", "numerics", "data"}
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["numerics"]["threads"] == torch.get_num_threads()
    assert compare_manifests([manifest, copy.deepcopy(manifest)], {}) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packages.torch", "2.0.0"),
        ("packages.numpy", None),
        ("packages.pillow", "9.0"),
        ("python", "3.8.0"),
        ("code", "f" * 32),
        ("data", "1" * 32),
        ("weights", "1" * 32),
        ("numerics.threads", 77),
        ("numerics.matmul_tf32", "odd"),
        ("numerics.default_dtype", "torch.float64"),
        ("variables.NVIDIA_TF32_OVERRIDE", "1"),
        ("cpu.capability", "NO SUCH"),
        ("device.type", "cuda"),
    ],
)
def test_forbidden_difference_names_ranks_and_values(manifest: dict[str, Any], field: str, value: Any) -> None:
    (difference,) = compare_manifests([manifest, changed(manifest, field, value), manifest], {})
    assert (difference.field, difference.allowed) == (field, False)
    assert difference.values[1] == value
    assert str(difference) == f"{field}: {difference.values[0]!r} on replicas 0, 2; {value!r} on replica 1"


@pytest.mark.parametrize("field", ["host", "cpu.model", "device.name", "seed"])
def test_allowed_difference_is_recorded(manifest: dict[str, Any], field: str) -> None:
    (difference,) = compare_manifests([manifest, changed(manifest, field, "other")], {})
    assert (difference.field, difference.allowed) == (field, True)


def test_gpu_model_may_differ_but_not_cuda(manifest: dict[str, Any]) -> None:
    gpu = {"type": "cuda", "index": 0, "name": "A", "uuid": "1", "capability": "8.0", "shared": False}
    gpu |= {"driver": "1.0", "cuda": "13.2", "cudnn": 91000}
    one = {**manifest, "device": gpu}
    two = {**manifest, "device": gpu | {"name": "B", "uuid": "2", "capability": "9.0", "index": 1, "driver": "1.1"}}
    assert all(difference.allowed for difference in compare_manifests([one, two], {}))
    three = {**manifest, "device": gpu | {"cuda": "12.0", "cudnn": 90000}}
    wrong = [difference.field for difference in compare_manifests([one, three], {}) if not difference.allowed]
    assert wrong == ["device.cuda", "device.cudnn"]


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [
        ("numerics.threads", "threads", 2),
        ("numerics.matmul_tf32", "tf32", True),
        ("numerics.cudnn_deterministic", "mode", "off"),
        ("numerics.cudnn_deterministic", "cudnn_deterministic", False),
        ("numerics.cublas_workspace_config", "mode", "off"),
        ("numerics.onednn", "onednn", False),
    ],
)
def test_override_allows_its_fields_on_its_replica_only(
    manifest: dict[str, Any], field: str, key: str, value: Any
) -> None:
    other = changed(manifest, field, "odd")
    declared = {1: {"determinism": {key: value}}}
    (difference,) = compare_manifests([manifest, other, manifest], declared)
    assert difference.allowed
    (difference,) = compare_manifests([manifest, manifest, other], declared)
    assert not difference.allowed
    (difference,) = compare_manifests([manifest, other, manifest], {1: {"determinism": None, "optim": {"lr": 1}}})
    assert not difference.allowed


@pytest.mark.parametrize("field", ["numerics.threads", "packages.torch", "data", "variables.MKL_CBWR", "device.type"])
def test_override_allows_no_other_field(manifest: dict[str, Any], field: str) -> None:
    declared = {1: {"determinism": {"tf32": True, "mode": "off"}, "optim": {"lr": 0.1}}}
    (difference,) = compare_manifests([manifest, changed(manifest, field, "odd")], declared)
    assert not difference.allowed


def test_override_of_the_device_allows_the_device(manifest: dict[str, Any]) -> None:
    (difference,) = compare_manifests(
        [manifest, changed(manifest, "device.type", "cuda")], {0: {"world": {"device": "cpu"}}}
    )
    assert difference.allowed


def test_fields_decided_by_config_keys_exist(manifest: dict[str, Any]) -> None:
    for field, keys in manifest_module._FOLLOWS_FROM.items():
        section, _, name = field.partition(".")
        if section == "numerics":
            assert name in manifest["numerics"]
            assert {key.removeprefix("determinism.") for key in keys} <= set(DeterminismConfig.model_fields)


def test_compare_values_is_recursive() -> None:
    one = {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "overrides": {"1": {"optim": {"lr": 1}}}, "seed": None}
    two = copy.deepcopy(one)
    assert compare_values([one, two]) == []
    two["optim"]["betas"][1] = 0.999  # type: ignore[index]
    two["overrides"]["1"]["train"] = {"amp": "bf16"}  # type: ignore[index]
    assert [difference.field for difference in compare_values([one, two])] == ["optim.betas", "overrides.1.train.amp"]


def test_source_digest_covers_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere" / "dreplica"
    shutil.copytree(PACKAGE_ROOT, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(manifest_module, "PACKAGE_ROOT", copied)
    first = source_digest.__wrapped__()
    assert len(first) == 32
    assert source_digest.__wrapped__() == first
    file = copied / "training" / "step.py"
    file.write_text(file.read_text() + "#")
    second = source_digest.__wrapped__()
    assert second != first
    file.rename(file.with_name("steps.py"))
    assert source_digest.__wrapped__() not in {first, second}


GPU = {"type": "cuda", "index": 1, "name": "NVIDIA H200", "uuid": "2f3c-7a", "capability": "9.0", "shared": False}
GPU |= {"driver": "570.1", "cuda": "13.2", "cudnn": 91000}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("device.name", "NVIDIA H100", True),
        ("device.capability", "8.0", True),
        ("device.driver", "550.2", True),
        ("device.uuid", "other", True),
        ("device.cudnn", 90000, False),
        ("numerics.cudnn_benchmark", "odd", False),
        ("numerics.cudnn_enabled", "odd", False),
        ("numerics.attention_backends", ["math"], False),
        ("numerics.cudnn_conv_fp32_precision", "odd", False),
        ("numerics.cublas_workspace_config", ":0:0", False),
        ("variables.TORCH_BLAS_PREFER_CUBLASLT", "1", False),
    ],
)
def test_gpus_may_differ_but_not_their_settings(
    manifest: dict[str, Any], field: str, value: Any, allowed: bool
) -> None:
    one = {**manifest, "device": GPU}
    (difference,) = compare_manifests([one, changed(one, field, value)], {})
    assert (difference.field, difference.allowed) == (field, allowed)


def test_card_is_named_as_in_nvidia_smi(manifest: dict[str, Any]) -> None:
    assert card_of(manifest) is None
    assert spell_device(manifest).endswith(" of host a-host")
    whole = {**manifest, "device": GPU}
    assert spell_device(whole) == "NVIDIA H200, GPU-2f3c-7a, cuda:1 of host a-host"
    slice_ = {**manifest, "device": GPU | {"name": "NVIDIA H100 MIG 1g.10gb"}}
    assert card_of(slice_) == "MIG-2f3c-7a"


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
    assert manifest_module._driver_version.__wrapped__() == "570.86.15"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Nvml(name, starts=999))
    assert manifest_module._driver_version.__wrapped__() is None
    monkeypatch.setattr(ctypes, "CDLL", _not_found)
    assert manifest_module._driver_version.__wrapped__() is None
