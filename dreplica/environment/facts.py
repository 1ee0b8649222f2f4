"""The facts about one process that its results may depend on: software, hardware, flags, variables and script."""

import ctypes
import importlib.metadata
import platform
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash

from dreplica import __version__
from dreplica.config.paths import PACKAGE_ROOT
from dreplica.environment.determinism import numerics_flags
from dreplica.environment.distributions import installed_distributions
from dreplica.environment.script import script_arguments, script_commit, script_digest
from dreplica.environment.variables import relevant_variables


def collect_environment(device: torch.device, seed: int | None = None) -> dict[str, Any]:
    """Return the environment of this process, as one row of `manifest.json`.

    Args:
        device: The device that the model is on.
        seed: The seed that the model was built from, if it is known.

    Returns:
        JSON values by field. They contain no secrets: see `dreplica.environment.masking`.
    """
    return {
        "host": socket.gethostname(),
        "seed": seed,
        "argv": script_arguments(),
        "script": script_digest(),
        "commit": script_commit(),
        "code": source_digest(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("dreplica", "torch", "torchvision", "numpy", "pillow")},
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "model": _cpu_model()},
        "device": describe_device(device),
        "numerics": numerics_flags(),
        "variables": relevant_variables(),
        # The metadata of torch lacks the local version, such as +cpu.
        "distributions": installed_distributions() | {"torch": str(torch.__version__)},
    }


def describe_device(device: torch.device, shared: bool | None = None) -> dict[str, Any]:
    """Return the properties of a device.

    Args:
        device: The device.
        shared: True if replicas on this node share it. None if that is unknown.
    """
    if device.type != "cuda":
        return {"type": device.type, "name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "index": torch.cuda.current_device() if device.index is None else device.index,
        "name": properties.name,
        "uuid": str(properties.uuid),
        "capability": f"{properties.major}.{properties.minor}",
        "shared": shared,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


@cache
def source_digest() -> str:
    """Return a digest of dreplica's source files, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for path in sorted(PACKAGE_ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


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
