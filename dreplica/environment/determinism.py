"""Every setting that decides how numbers are rounded, in one function.

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

_OR_OFF = "or take --determinism.mode off, and see whether replicas agree"

CHANGEABLE = ("threads", "onednn")
"""Flags that change how numbers are rounded on the CPU, and that may be changed and put back between two steps."""


def set_environment(config: DeterminismConfig) -> str | None:
    """Sets what the CUDA libraries read once at their start, unless they have started: what is set then, none has seen.

    Never overwrites a user's own variable. Returns why cuBLAS may be nondeterministic on a GPU, and what to do about
    it; None if it is not, and in mode `off`, in which it may be.
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
        seen = f"{_WORKSPACE} was set to {present} from within a process that has started CUDA, which reads it once"
    elif by_user:
        seen = f"{_WORKSPACE} is {present} in the environment, with which cuBLAS is not deterministic"
        return f"{seen}. Before the run: unset {_WORKSPACE}, or export {_WORKSPACE}=:4096:8 ({_OR_OFF})."
    elif wanted not in DETERMINISTIC_WORKSPACES:
        value = "null" if wanted is None else repr(wanted)
        seen = f"determinism.cublas_workspace_config: {value} leaves cuBLAS nondeterministic"
        return f"{seen}. Set it to {good} ({_OR_OFF})."
    else:
        seen = f"{_WORKSPACE} is not set, and something that was imported has started CUDA, which reads it once"
    return f"{seen}. Before the run: export {_WORKSPACE}=:4096:8; or import what uses CUDA later ({_OR_OFF})."


def environment_at_start() -> set[str]:
    """The variables that this process was started with. os.environ shows those set since, too."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return set(os.environ)
    return {os.fsdecode(entry.partition(b"=")[0]) for entry in entries}


def apply_determinism(config: DeterminismConfig) -> None:
    """Puts every flag of the section into effect, in this process; `set_environment` comes first, before CUDA."""
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
    """Every flag as torch now has it, whoever set it: what the manifest records and the preflight compares."""
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
    """Inside, the flags in `CHANGEABLE` are as `flags` has them; keys as of `numerics_flags`."""
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(flags.get("threads", before[0]))
    torch.backends.mkldnn.enabled = flags.get("onednn", before[1])
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.mkldnn.enabled = before[1]


def fp32_precision() -> dict[str, str]:
    """What float32 numbers may be rounded to on the way, by library and operation: `ieee` (not at all), `tf32`, `bf16`.

    Read as torch now has it. The older flags (`allow_tf32`) raise once somebody has used the newer ones beside them.
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
    """The backends that scaled dot product attention may choose on a GPU, each with whether it is enabled."""
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
    except RuntimeError:  # set through the newer flags, to what has no name among the older ones
        return "mixed"


def _flushes_denormals() -> bool:
    """torch has a setter for this flag but no getter, so ask the processor: is the smallest denormal kept?"""
    return bool((torch.tensor([1e-45], dtype=torch.float32, device="cpu") * 1).item() == 0)
