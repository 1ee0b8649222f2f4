"""What each replica runs on and with: recorded, exchanged before the first step, and compared."""

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

# A field of these may differ between replicas without an error; it stays in the record as a suspect.
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
# A field that follows from config keys: a replica whose `overrides` name one of the keys may differ in it.
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
# Variables by which the libraries beneath torch change how they round, whatever torch's own flags say.
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
    """One manifest field on which replicas do not have the same value."""

    field: str
    values: tuple[Any, ...]
    """One value per replica."""
    allowed: bool
    """Whether replicas may differ in it: a fact to remember, not an error."""

    @property
    def may_round(self) -> bool:
        """Whether hardware that differs in it may round differently, without being at fault."""
        return self.field in _MAY_ROUND

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for replica_id, value in enumerate(self.values):
            groups.setdefault(repr(value), []).append(replica_id)
        sides = (
            f"{value} on replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}" for value, ids in groups.items()
        )
        return f"{self.field}: {'; '.join(sides)}"


def collect_manifest(
    world: World, device: Device, seed: int | None, data_digest: str, weights_digest: str | None = None
) -> dict[str, Any]:
    """This replica's manifest; JSON values only.

    Args:
        world: for the host's name.
        device: this replica's.
        seed: the model seed.
        data_digest: of the data set as loaded.
        weights_digest: of the file that pretrained weights came from; None without, or before the build.
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
    """The fields (dotted) on which replicas' mappings differ, none of them allowed to."""
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
    """The fields on which replicas differ. `declared`: the config's `overrides`, which excuse what follows."""
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
    """The config keys (dotted) that decide a manifest field; none for a fact of the machine or its software."""
    return _FOLLOWS_FROM.get(field, ())


def spell_device(manifest: Mapping[str, Any]) -> str:
    """The physical thing that a replica runs on, and the host it is in."""
    device, host = manifest["device"], manifest["host"]
    if device["type"] != "cuda":
        return f"{manifest['cpu']['model'] or 'the CPU'} of host {host}"
    return f"{device['name']}, {card_of(manifest)}, cuda:{device['index']} of host {host}"


def card_of(manifest: Mapping[str, Any]) -> str | None:
    """The UUID of a replica's GPU, or of its slice of one, as nvidia-smi writes it; None on the CPU."""
    device = manifest["device"]
    if device["type"] != "cuda":
        return None
    return f"{'MIG' if ' MIG ' in device['name'] else 'GPU'}-{device['uuid']}"


@cache
def source_digest() -> str:
    """32 hex digits over dreplica's own source files: which code runs, whatever its version says."""
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
        return _driver_version_by_nvml()  # a container need not show the kernel's files
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found and found.group()


def _driver_version_by_nvml() -> str | None:
    """https://docs.nvidia.com/deploy/nvml-api/group__nvmlSystemQueries.html"""
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
