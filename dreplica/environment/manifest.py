"""Manifest of each replica's environment, exchanged and compared before the first step."""

import ctypes
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash

from dreplica import __version__
from dreplica.config.paths import PACKAGE_ROOT
from dreplica.distributed.process_group import World
from dreplica.environment.determinism import numerics_flags
from dreplica.environment.device import Device

# Fields that may differ between replicas without an error. A difference is recorded as a possible cause.
_MAY_DIFFER = {
    "host",
    "cpu.model",
    "device.index",
    "device.name",
    "device.uuid",
    "device.capability",
    "device.driver",
    "device.shared",
    "seed",
}
_MAY_ROUND = {"cpu.model", "device.name", "device.capability", "device.driver"}
# Config keys that decide a field: a replica with one of the keys in its `overrides` may differ in the field.
_FOLLOWS_FROM = {
    "numerics.deterministic_algorithms": ("determinism.mode",),
    "numerics.deterministic_warn_only": ("determinism.mode",),
    "numerics.fill_uninitialized_memory": ("determinism.fill_uninitialized_memory",),
    "numerics.threads": ("determinism.threads",),
    "numerics.cudnn_benchmark": ("determinism.cudnn_benchmark",),
    "numerics.cudnn_deterministic": ("determinism.cudnn_deterministic", "determinism.mode"),
    "numerics.cudnn_tf32": ("determinism.tf32",),
    "numerics.matmul_tf32": ("determinism.tf32",),
    "numerics.float32_matmul_precision": ("determinism.tf32",),
    "numerics.cuda_matmul_fp32_precision": ("determinism.tf32",),
    "numerics.cudnn_conv_fp32_precision": ("determinism.tf32",),
    "numerics.cudnn_rnn_fp32_precision": ("determinism.tf32",),
    "numerics.matmul_fp16_reduced_precision": ("determinism.reduced_precision_reduction",),
    "numerics.matmul_bf16_reduced_precision": ("determinism.reduced_precision_reduction",),
    "numerics.onednn": ("determinism.onednn",),
    "numerics.cublas_workspace_config": ("determinism.cublas_workspace_config", "determinism.mode"),
    "weights": ("model.weights", "model.name", "model.factory", "replica.factory"),
    "device.type": ("world.device",),
    "device.cuda": ("world.device",),
    "device.cudnn": ("world.device",),
}
# Environment variables that change rounding in the libraries below torch, regardless of torch's flags.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLASLT_WORKSPACE_SIZE",
    "DISABLE_ADDMM_CUDA_LT",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED",
)


@dataclass(frozen=True)
class Difference:
    """A manifest field whose value differs between replicas."""

    field: str
    """Dotted name of the field."""
    values: tuple[Any, ...]
    """One value per replica."""
    allowed: bool
    """True if replicas may differ in the field, so that the difference is recorded but no error."""

    @property
    def may_round(self) -> bool:
        """True if sound hardware that differs in the field may round differently."""
        return self.field in _MAY_ROUND

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for replica_id, value in enumerate(self.values):
            groups.setdefault(repr(value), []).append(replica_id)
        parts = (
            f"{value} on replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}" for value, ids in groups.items()
        )
        return f"{self.field}: {'; '.join(parts)}"


def collect_manifest(
    world: World, device: Device, seed: int | None, data_digest: str, weights_digest: str | None = None
) -> dict[str, Any]:
    """Return the manifest of this replica.

    Args:
        world: This replica's process, for the name of its host.
        device: This replica's device.
        seed: The model seed.
        data_digest: Digest of the data set as loaded.
        weights_digest: Digest of the file of pretrained weights, or None without one and before the build.

    Returns:
        JSON values by field.
    """
    return {
        "host": world.host,
        "seed": seed,
        "code": source_digest(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("dreplica", "torch", "torchvision", "numpy", "pillow")},
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "model": _cpu_model()},
        "device": _describe_device(device),
        "numerics": numerics_flags(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "data": data_digest,
        "weights": weights_digest,
    }


def compare_values(rows: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the dotted fields in which the replicas' mappings differ, none of them allowed."""
    flat = [_flatten(row) for row in rows]
    columns = {field: tuple(row.get(field) for row in flat) for field in sorted(set().union(*flat))}
    return [
        Difference(field, values, allowed=False)
        for field, values in columns.items()
        if any(value != values[0] for value in values)
    ]


def compare_manifests(
    manifests: Sequence[Mapping[str, Any]], declared: Mapping[int, Mapping[str, Any]]
) -> list[Difference]:
    """Return the fields in which replicas' manifests differ.

    Args:
        manifests: The manifest of each replica.
        declared: The config's `overrides` by replica id, which allow differences in the fields that they decide.
    """
    return [replace(item, allowed=_is_allowed(item, declared)) for item in compare_values(manifests)]


def _is_allowed(difference: Difference, declared: Mapping[int, Mapping[str, Any]]) -> bool:
    if difference.field in _MAY_DIFFER:
        return True
    keys = {tuple(key.split(".")) for key in _FOLLOWS_FROM.get(difference.field, ())}
    undeclared = [
        value
        for replica_id, value in enumerate(difference.values)
        if not any(key in (declared.get(replica_id, {}).get(section) or {}) for section, key in keys)
    ]
    return all(value == undeclared[0] for value in undeclared)


def follows_from(field: str) -> tuple[str, ...]:
    """Return the dotted config keys that decide a manifest field.

    There are none for fields of the machine and its software.
    """
    return _FOLLOWS_FROM.get(field, ())


def spell_device(manifest: Mapping[str, Any]) -> str:
    """Return a text that names the physical device of a replica and its host."""
    device, host = manifest["device"], manifest["host"]
    if device["type"] != "cuda":
        return f"{manifest['cpu']['model'] or 'the CPU'} of host {host}"
    return f"{device['name']}, {card_of(manifest)}, cuda:{device['index']} of host {host}"


def card_of(manifest: Mapping[str, Any]) -> str | None:
    """Return the UUID of a replica's GPU or MIG slice as in nvidia-smi, or None on the CPU."""
    device = manifest["device"]
    if device["type"] != "cuda":
        return None
    return f"{'MIG' if ' MIG ' in device['name'] else 'GPU'}-{device['uuid']}"


@cache
def source_digest() -> str:
    """Return a digest of dreplica's source files, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for path in sorted(PACKAGE_ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _describe_device(device: Device) -> dict[str, Any]:
    if device.device.type != "cuda":
        return {"type": device.device.type, "name": device.device.type}
    properties = torch.cuda.get_device_properties(device.device)
    return {
        "type": "cuda",
        "index": device.device.index,
        "name": properties.name,
        "uuid": str(properties.uuid),
        "capability": f"{properties.major}.{properties.minor}",
        "shared": device.shared,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _version(package: str) -> str | None:
    if package == "dreplica":
        return __version__
    if package == "torch":
        return str(torch.__version__)
    if package == "numpy":
        return numpy.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _driver_version_by_nvml()  # not visible in some containers
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found and found.group()


def _driver_version_by_nvml() -> str | None:
    # https://docs.nvidia.com/deploy/nvml-api/group__nvmlSystemQueries.html
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    version = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() != 0:
        return None
    failed = nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlShutdown()
    return None if failed else version.value.decode()


@cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat[f"{prefix}{key}"] = tuple(item)
        else:
            flat[f"{prefix}{key}"] = item
    return flat
