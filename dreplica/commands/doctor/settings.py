"""Checks of the flags and variables of a process that sets none of them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dreplica.commands.doctor.check import Check
from dreplica.environment.determinism import DETERMINISTIC_WORKSPACES, environment_at_start
from dreplica.environment.variables import STRICT

_LOOP = "dreplica sets it; a custom training loop must set it."
_SET_BY_TORCH = {"TORCHINDUCTOR_CACHE_DIR"}
_AUTOTUNE = ("TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "TORCHINDUCTOR_BENCHMARK_FUSION")


def check_settings(manifest: Mapping[str, Any], gpu: bool, cuda_started: bool) -> list[Check]:
    """Check the settings that a process gets from this environment.

    Args:
        manifest: The manifest from before any flag was set.
        gpu: True if torch sees a GPU.
        cuda_started: True if CUDA had been started before the doctor ran.
    """
    numerics = manifest["numerics"]
    return [
        _versions(manifest),
        _algorithms(numerics),
        _float32(numerics, gpu),
        _cublas(gpu, cuda_started),
        _libraries(manifest["variables"]),
        _inductor(),
        _launch_blocking(gpu),
    ]


def _versions(manifest: Mapping[str, Any]) -> Check:
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in manifest["packages"].items())
    device, cpu = manifest["device"], manifest["cpu"]
    seen = f"Python {manifest['python']}, {packages}, built for CUDA {torch.version.cuda or 'none'}; CPU {cpu['model']}"
    seen += f", kernels for {cpu['capability']}"
    if device["type"] == "cuda":
        seen += f"; cuDNN {device['cudnn']}, driver {device['driver'] or 'unknown'}"
    why = "Other versions, and kernels for other CPUs, round differently; replicas compare these before the first step."
    return Check("versions", "ok", seen, why)


def _algorithms(numerics: Mapping[str, Any]) -> Check:
    name = "deterministic algorithms"
    benchmark = numerics["cudnn_benchmark"]
    state = "not required"
    if numerics["deterministic_algorithms"]:
        state = "only warned about" if numerics["deterministic_warn_only"] else "required"
    if state == "required" and not benchmark:
        return Check(name, "ok", "required from the start")
    return Check(
        name,
        "warn",
        f"{state} by default, cuDNN {'times' if benchmark else 'does not time'} its algorithms",
        f"Operators may add in any order, and cuDNN may choose algorithms that do. {_LOOP}",
        ("torch.use_deterministic_algorithms(True); torch.backends.cudnn.benchmark = False",),
    )


def _float32(numerics: Mapping[str, Any], gpu: bool) -> Check:
    name = "float32 precision"
    reduced = {
        key.removesuffix("_fp32_precision"): value
        for key, value in numerics.items()
        if key.endswith("_fp32_precision") and value != "ieee"
    }
    if not reduced:
        return Check(name, "ok", "full in every matrix product and convolution")
    seen = ", ".join(f"{key}: {value}" for key, value in reduced.items())
    if not gpu and all(key.startswith("cud") for key in reduced):
        return Check(name, "ok", f"{seen}; torch sees no GPU, so these change nothing")
    return Check(
        name,
        "warn",
        seen,
        "Reduced precision repeats bit for bit on one model of GPU and differs on another, and from the CPU. "
        "dreplica turns TF32 off unless determinism.tf32 is true; a custom training loop must turn it off.",
        ("torch.backends.cudnn.allow_tf32 = False; torch.backends.cuda.matmul.allow_tf32 = False",),
    )


def _cublas(gpu: bool, cuda_started: bool) -> Check:
    name = "CUBLAS_WORKSPACE_CONFIG"
    present = os.environ.get(name)
    why = (
        "cuBLAS chooses its algorithm by the workspace at hand, which several streams may share; it reads the variable "
        "once, so setting it after CUDA has started does nothing."
    )
    remedy = (f"export {name}=:4096:8",)
    if present is None:
        if not gpu:
            return Check(name, "ok", "not set; torch sees no GPU, so it changes nothing", why)
        return Check(name, "warn", "not set", f"{why} {_LOOP}", remedy)
    if present not in DETERMINISTIC_WORKSPACES:
        seen = f"{present}, with which cuBLAS is not deterministic; dreplica does not overwrite a variable that is set"
        return Check(name, "bad" if gpu else "warn", seen, why, remedy)
    if cuda_started and name not in environment_at_start():
        return Check(name, "bad", f"{present}, set from within a process that has started CUDA", why, remedy)
    return Check(name, "ok", present, why)


def check_hashes(hashes: Sequence[int]) -> Check:
    """Check the hashes of one string, each computed in a new process."""
    name = "PYTHONHASHSEED"
    present = os.environ.get(name, "not set")
    if len(set(hashes)) == 1:
        return Check(name, "ok", f"{present}; a string has one hash in {len(hashes)} processes")
    return Check(
        name,
        "warn",
        f"{present}; a string has {len(set(hashes))} hashes in {len(hashes)} processes",
        "A set of strings has a different order in every process: classes or files numbered in that order get "
        "different numbers. dreplica does not depend on it; your code may.",
        (f"export {name}=0", "sorted(names)  # in the code, instead of the order of a set"),
    )


def _libraries(variables: Mapping[str, Any]) -> Check:
    name = "library variables"
    why = (
        "These change how cuBLAS, MKL and oneDNN round, independently of torch's flags. Replicas compare them before "
        "the first step."
    )
    present = {key: variables[key] for key in STRICT if variables[key] is not None}
    if not present:
        return Check(name, "ok", f"none of {', '.join(STRICT)} is set", why)
    seen = ", ".join(f"{key}={value}" for key, value in present.items())
    return Check(
        name, "warn", seen, why, (f"unset {' '.join(present)}  # or set them to the same values on every machine",)
    )


def _inductor() -> Check:
    name = "torch.compile"
    present = {
        key: value for key, value in os.environ.items() if key.startswith("TORCHINDUCTOR_") and key not in _SET_BY_TORCH
    }
    seen = ", ".join(f"{key}={value}" for key, value in sorted(present.items())) or "no TORCHINDUCTOR_ variable is set"
    tuned = [key for key in _AUTOTUNE if present.get(key) == "1"]
    if not tuned or present.get("TORCHINDUCTOR_DETERMINISTIC") == "1":
        return Check(name, "ok", seen)
    return Check(
        name,
        "warn",
        seen,
        "Kernels are chosen by timing them, and two processes may choose differently. Deterministic algorithms turn "
        f"that off. {_LOOP}",
        (f"unset {' '.join(tuned)}", "export TORCHINDUCTOR_DETERMINISTIC=1  # or keep them, and time nothing"),
    )


def _launch_blocking(gpu: bool) -> Check:
    name = "CUDA_LAUNCH_BLOCKING"
    present = os.environ.get(name, "not set")
    if present in {"not set", "0"} or not gpu:
        return Check(name, "ok", present)
    return Check(
        name,
        "warn",
        present,
        "Kernels run one after another, which is slower and hides races between streams.",
        (f"unset {name}",),
    )
