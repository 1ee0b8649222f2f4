"""Every setting that decides how numbers are rounded, in one function.

The list follows PyTorch's notes on reproducibility (https://docs.pytorch.org/docs/stable/notes/randomness.html) and the
documentation of `torch.use_deterministic_algorithms`.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field

from dreplica.section import Section

log = logging.getLogger(__name__)

DETERMINISTIC_WORKSPACES = {":4096:8", ":16:8"}
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic."""

CHANGEABLE = ("threads", "onednn")
"""Flags that change how numbers are rounded on the CPU, and that may be changed and put back between two steps."""


class DeterminismConfig(Section):
    """How numbers are rounded: every flag on its own."""

    mode: Literal["strict", "warn", "off"] = "strict"
    """`strict`: an operator without a deterministic implementation raises; `warn`: it warns; `off`: anything goes."""
    threads: int = Field(1, ge=1, le=1024)
    """Threads of one CPU operator; another number rounds differently, so it is fixed here and not left to the
    machine."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and pick one; two replicas may pick differently."""
    cudnn_deterministic: bool | None = None
    """Restrict cuDNN to deterministic algorithms; null: unless mode is `off`."""
    tf32: bool = False
    """Allow TensorFloat-32 in matrix products and convolutions on the GPU."""
    reduced_precision_reduction: bool = False
    """Allow fp16 and bf16 matrix products on the GPU to accumulate in reduced precision."""
    onednn: bool = True
    """Use oneDNN kernels on the CPU."""
    fill_uninitialized_memory: bool = True
    """In strict and warn mode, fill `torch.empty` and its kind with NaN so that reading it is reproducible."""
    cublas_workspace_config: str | None = ":4096:8"
    """CUBLAS_WORKSPACE_CONFIG, set before CUDA starts unless the environment already has it; null: not set."""


def set_environment(config: DeterminismConfig) -> None:
    """Sets what the CUDA libraries read once at their start. Never overwrites a user's own variable."""
    if config.cublas_workspace_config is None or config.mode == "off":
        return
    present = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", config.cublas_workspace_config)
    if present not in DETERMINISTIC_WORKSPACES:
        log.warning(
            "CUBLAS_WORKSPACE_CONFIG is %s and is left so; cuBLAS is deterministic only with one of %s.",
            present,
            ", ".join(sorted(DETERMINISTIC_WORKSPACES)),
        )


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
        "onednn": bool(torch.backends.mkldnn.enabled),
        "onednn_deterministic": bool(torch.backends.mkldnn.deterministic),
        "flush_denormal": _flushes_denormals(),
        "default_dtype": str(torch.get_default_dtype()),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
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


def _float32_matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer flags, to what has no name among the older ones
        return "mixed"


def _flushes_denormals() -> bool:
    """torch has a setter for this flag but no getter, so ask the processor: is the smallest denormal kept?"""
    return bool((torch.tensor([1e-45], dtype=torch.float32) * 1).item() == 0)
