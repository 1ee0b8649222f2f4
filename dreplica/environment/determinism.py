"""All settings that decide how numbers are rounded, applied in one function.

The list follows PyTorch's notes on reproducibility (https://docs.pytorch.org/docs/stable/notes/randomness.html) and the
documentation of `torch.use_deterministic_algorithms`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dreplica.config.schema import DeterminismConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = {":4096:8", ":16:8"}
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic."""

_OR_OFF = "or use --determinism.mode off to find out whether the replicas agree without it"

CHANGEABLE = ("threads", "onednn")
"""Flags that change rounding on the CPU, and that can be changed and restored between two steps."""


def set_environment(config: DeterminismConfig) -> str | None:
    """Set the environment variable that cuBLAS reads once, when CUDA starts.

    A variable that the user has set is never overwritten. After CUDA has started, nothing is set: it would have no
    effect.

    Args:
        config: The section `determinism`.

    Returns:
        Why cuBLAS may be nondeterministic on a GPU, and how to fix it. None if it is deterministic, or with mode `off`,
        which permits that it is not.
    """
    if config.mode == "off":
        return None
    started, wanted = torch.cuda.is_initialized(), config.cublas_workspace_config
    by_user = _WORKSPACE in os.environ
    if wanted is not None and not started:
        os.environ.setdefault(_WORKSPACE, wanted)
    present = os.environ.get(_WORKSPACE)
    good = " or ".join(sorted(DETERMINISTIC_WORKSPACES))
    if present in DETERMINISTIC_WORKSPACES:
        if not started or _WORKSPACE in environment_at_start():
            return None
        seen = f"{_WORKSPACE} was set to {present} inside this process, which has started CUDA, and CUDA reads it once"
    elif by_user:
        seen = f"{_WORKSPACE}={present} in the environment makes cuBLAS nondeterministic"
        return f"{seen}. Unset {_WORKSPACE} before the run, or export {_WORKSPACE}=:4096:8 ({_OR_OFF})."
    elif wanted not in DETERMINISTIC_WORKSPACES:
        value = "null" if wanted is None else repr(wanted)
        seen = f"determinism.cublas_workspace_config: {value} leaves cuBLAS nondeterministic"
        return f"{seen}. Set it to {good} ({_OR_OFF})."
    else:
        seen = f"{_WORKSPACE} is not set, and an imported module has started CUDA, which reads it once"
    return f"{seen}. Export {_WORKSPACE}=:4096:8 before the run, or import what uses CUDA later ({_OR_OFF})."


def environment_at_start() -> set[str]:
    """Return the names of the environment variables that this process was started with.

    `os.environ` also has those set since.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return set(os.environ)
    return {os.fsdecode(entry.partition(b"=")[0]) for entry in entries}


def apply_determinism(config: DeterminismConfig) -> None:
    """Apply all flags of the section `determinism` to this process.

    Call `set_environment` first, before CUDA starts.
    """
    torch.use_deterministic_algorithms(config.mode != "off", warn_only=config.mode == "warn")
    torch.utils.deterministic.fill_uninitialized_memory = config.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    deterministic = config.cudnn_deterministic
    torch.backends.cudnn.deterministic = config.mode != "off" if deterministic is None else deterministic
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = config.reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = config.reduced_precision_reduction
    torch.backends.mkldnn.enabled = config.onednn  # type: ignore[assignment]


def numerics_flags() -> dict[str, Any]:
    """Return the current value of each numerics flag of torch.

    The manifest records them, and the preflight check compares them between replicas.
    """
    matmul = torch.backends.cuda.matmul
    precision = fp32_precision()
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": bool(torch.utils.deterministic.fill_uninitialized_memory),  # type: ignore[attr-defined]
        "threads": torch.get_num_threads(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_tf32": precision["cudnn.conv"] == "tf32",
        "matmul_tf32": precision["cuda.matmul"] == "tf32",
        **{f"{name.replace('.', '_')}_fp32_precision": value for name, value in precision.items()},
        "matmul_fp16_accumulation": matmul.allow_fp16_accumulation,
        "matmul_fp16_reduced_precision": matmul.allow_fp16_reduced_precision_reduction,
        "matmul_bf16_reduced_precision": matmul.allow_bf16_reduced_precision_reduction,
        "float32_matmul_precision": _float32_matmul_precision(),
        "cudnn_enabled": torch.backends.cudnn.enabled,
        "attention_backends": [name for name, enabled in _attention().items() if enabled],
        "onednn": bool(torch.backends.mkldnn.enabled),
        "onednn_deterministic": bool(torch.backends.mkldnn.deterministic),
        "flush_denormal": _flushes_denormals(),
        "default_dtype": str(torch.get_default_dtype()),
        "cublas_workspace_config": os.environ.get(_WORKSPACE),
    }


@contextmanager
def numerics_as(flags: Mapping[str, Any]) -> Iterator[None]:
    """Set the flags in `CHANGEABLE` inside the body.

    Args:
        flags: Values by flag, with the keys of `numerics_flags`. A flag that is missing is not changed.
    """
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(flags.get("threads", before[0]))
    torch.backends.mkldnn.enabled = flags.get("onednn", before[1])
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.mkldnn.enabled = before[1]


def fp32_precision() -> dict[str, str]:
    """Return the internal precision of float32 operations, by library and operation.

    Read from the newer flags: the older ones (`allow_tf32`) raise once the newer ones were set in addition to them.

    Returns:
        `ieee` (full float32), `tf32` or `bf16` for each of `cuda.matmul`, `cudnn.conv` and so on.
    """
    backends: Any = torch.backends
    found = {
        "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv,
        "cudnn.rnn": backends.cudnn.rnn,
        "onednn.matmul": backends.mkldnn.matmul,
        "onednn.conv": backends.mkldnn.conv,
        "onednn.rnn": backends.mkldnn.rnn,
    }
    return {name: "ieee" if kind.fp32_precision == "none" else kind.fp32_precision for name, kind in found.items()}


def _attention() -> dict[str, bool]:
    """Return which backends scaled dot product attention may choose on a GPU."""
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


def _float32_matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer flags, to a value that the older ones cannot express
        return "mixed"


def _flushes_denormals() -> bool:
    """Return True if denormals are flushed to zero, which torch can set but not read."""
    return bool((torch.tensor([1e-45], dtype=torch.float32, device="cpu") * 1).item() == 0)
