"""Manifests: recorded, compared, with differences allowed only where an override declares them."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.environment import manifest as manifest_module
from dreplica.environment.device import Device
from dreplica.environment.facts import collect_environment
from dreplica.environment.manifest import (
    Difference,
    card_of,
    collect_manifest,
    compare_manifests,
    compare_values,
    spell_device,
)

WORLD = World(0, 1, Channel(), None, "a-host")


@pytest.fixture
def manifest() -> dict[str, Any]:
    row = collect_manifest(WORLD, Device(torch.device("cpu")), 42, "0" * 32)
    return row | {"commit": {"sha": "a" * 40, "dirty": True, "diff": "b" * 32}}


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
    text = f"{field}: {difference.values[0]!r} on replicas 0, 2; {value!r} on replica 1"
    is_variable = field.startswith("variables.")
    assert str(difference) == text + " (it can change the precision of matrix products on GPUs)" * is_variable


@pytest.mark.parametrize(
    "field",
    [
        *("host", "cpu.model", "device.name", "seed", "argv", "script", "commit.sha", "commit.diff"),
        *("distributions.rich", "distributions.scipy", "variables.PYTHONHASHSEED", "variables.NCCL_ALGO"),
    ],
)
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


def test_recorded_environment_is_that_of_the_library(manifest: dict[str, Any]) -> None:
    row = collect_environment(torch.device("cpu"), 42)
    assert set(manifest) == {*row, "data", "weights"}
    assert {key for key in row if key != "commit" and row[key] != manifest[key]} == {"host"}


@pytest.mark.parametrize(
    ("field", "may_round"),
    [
        ("variables.GLIBC_TUNABLES", True),
        ("variables.PYTHONHASHSEED", False),
        ("variables.CUDA_VISIBLE_DEVICES", False),
        ("distributions.nvidia-cudnn-cu13", True),
        ("distributions.mkl", True),
        ("distributions.rich", False),
        ("commit.sha", False),
        ("argv", False),
        ("cpu.model", True),
    ],
)
def test_difference_may_round_where_kernels_may_differ(field: str, may_round: bool) -> None:
    assert Difference(field, ("a", "b"), allowed=True).may_round == may_round


def test_harmless_variables_are_no_difference(manifest: dict[str, Any]) -> None:
    """Slurm gives each task its GPU in CUDA_VISIBLE_DEVICES."""
    assert compare_manifests([manifest, changed(manifest, "variables.CUDA_VISIBLE_DEVICES", "1")], {}) == []


def test_unread_changes_are_no_difference(manifest: dict[str, Any]) -> None:
    unread = changed(manifest, "commit", {"sha": "a" * 40, "dirty": None, "diff": None})
    assert compare_manifests([manifest, unread], {}) == []
    other = changed(unread, "commit.sha", "c" * 40)
    assert [item.field for item in compare_manifests([manifest, other], {})] == ["commit.sha"]


def test_package_is_not_listed_as_distribution_too(manifest: dict[str, Any]) -> None:
    other = changed(changed(manifest, "packages.numpy", "1.0"), "distributions.numpy", "1.0")
    (difference,) = compare_manifests([manifest, other], {})
    assert (difference.field, difference.allowed) == ("packages.numpy", False)


def test_many_distributions_are_counted(manifest: dict[str, Any]) -> None:
    versions = {f"package-{i:02}": "1.0" for i in range(40)} | {"nvidia-nccl-cu13": "1.0"}
    rows = [{**manifest, "distributions": versions | {"package-39": text}} for text in ("2.0", "1.0", "2.0")]
    assert [item.field for item in compare_manifests(rows, {})] == ["distributions.package-39"]
    other = {**manifest, "distributions": dict.fromkeys(versions, "2.0")}
    rows = [{**manifest, "distributions": versions}, other, other]
    found = compare_manifests(rows, {})
    assert len(found) == 9
    assert "distributions.nvidia-nccl-cu13" in [item.field for item in found]
    assert (found[-1].field, found[-1].allowed) == ("distributions", True)
    assert found[-1].values[0] != found[-1].values[1] == found[-1].values[2]
    assert found[-1].values[0].startswith("33 more, digest ")
