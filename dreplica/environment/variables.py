"""Environment variables that can change results, and the sets that decide how they are compared."""

import os
import re

from dreplica.environment.masking import mask_text, names_secret

STRICT = (
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
"""Variables that change rounding in the libraries below torch, regardless of torch's flags.

Replicas must have equal values. A manifest has a value or None for each.
"""

_CHANGES = (
    # libm chooses its kernels by the CPU features that GLIBC_TUNABLES masks. Preloaded libraries replace any.
    ("GLIBC_TUNABLES", "the rounding of functions such as exp on the CPU"),
    ("LD_PRELOAD|LD_LIBRARY_PATH|LD_BIND_NOW", "which libraries are loaded"),
    (
        "NPY_.*|ATEN_.*|(DNNL|ONEDNN)_MAX_CPU_ISA|OPENBLAS_CORETYPE|MKL_(CBWR|ENABLE_INSTRUCTIONS)|BLIS_ARCH_.*|NUMBA_CPU_.*",
        "which instructions of the CPU are used, and so the rounding",
    ),
    # The number of threads splits sums.
    (
        "(OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|GOTO|BLIS|VECLIB|NUMEXPR|ARM_COMPUTE|LPCNET|NUMBA)_.*",
        "how sums are split between threads, and so the rounding",
    ),
    # Algorithm, protocol and topology decide the order of additions.
    ("(NCCL|RCCL|GLOO|UCC|TORCH_UCC|SHARP)_.*", "the order of additions in a collective"),
    (
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO|FLASH_ATTENTION_DETERMINISTIC|XFORMERS_.*",
        "whether attention is deterministic, and its rounding",
    ),
    ("(NVIDIA|TORCH|CUBLAS|CUDNN|XLA)_.*TF32.*", "the precision of matrix products on GPUs"),
    (
        "(CUBLAS|CUBLASLT|CUDNN|CUDA|NVIDIA|NVTE|MIOPEN|ROCBLAS|HIPBLAS|HIPBLASLT|HIP|HSA|FLASH_ATTENTION)_.*",
        "which kernels run on GPUs, and so the rounding",
    ),
    ("(TORCHINDUCTOR|TORCHDYNAMO|TRITON|XLA)_.*", "which kernels are compiled, and so the rounding"),
    ("(TORCH|PYTORCH|DISABLE_ADDMM|ACCELERATE)_.*", "which kernels torch chooses"),
    ("PYTHONHASHSEED", "the order of sets and the value of hash()"),
    ("LC_ALL|LC_COLLATE|LANG", "the order of sorted names"),
    ("PYTHONPATH|PYTHONOPTIMIZE", "which code is imported and which assertions run"),
    ("TOKENIZERS_PARALLELISM", "how tokenizers split their work"),
)
"""Patterns of the variables that are recorded, and what each can change. The first that matches counts."""
_RECORDED = re.compile("|".join(f"(?:{pattern})" for pattern, _ in _CHANGES))
_NOT_RECORDED = re.compile(
    # Folders of caches and installations, and the identity of a process, differ without any effect.
    "(?!LD_|PYTHON).*_(HOME|DIR|DIRS|PATH|ROOT|FILE|FILES)"
    "|TORCH_NCCL_.*|TORCH_SHOW_CPP_STACKTRACES|TORCH_CPP_LOG_LEVEL|TORCH_LOGS.*|TORCH_TRACE|TORCH_DISTRIBUTED_DEBUG"
    # numerics.cublas_workspace_config has this one.
    "|CUBLAS_WORKSPACE_CONFIG"
    "|NCCL_DEBUG.*|NCCL_SOCKET_IFNAME|NCCL_IB_HCA|GLOO_SOCKET_IFNAME|NCCL_COMM_ID|NVIDIA_(VISIBLE_DEVICES|REQUIRE_.*)"
    "|NVIDIA_DRIVER_CAPABILITIES|CUDA_MPS_.*|KMP_(INIT_AT_FORK|DUPLICATE_LIB_OK)|OMP_DISPLAY_.*|TORCH_CUDA_ARCH_LIST"
)
HARMLESS = {"CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING"}
"""Recorded variables that name a device or change the time at which kernels run, never their results."""
_NO_ROUNDING = {"PYTHONHASHSEED", "PYTHONPATH", "PYTHONOPTIMIZE", "LC_ALL", "LC_COLLATE", "LANG"} | HARMLESS
_LONGEST = 1000


def relevant_variables() -> dict[str, str | None]:
    """Return the environment variables that can change results, without those that look like a secret.

    Returns:
        Value by name: None for a variable of `STRICT` that is not set. Other variables are left out unless they are
        set.
    """
    values: dict[str, str | None] = {name: os.environ.get(name) for name in STRICT}
    for name in sorted(os.environ):
        value = os.environ[name]
        if name in values or not _RECORDED.fullmatch(name) or _NOT_RECORDED.fullmatch(name):
            continue
        if not names_secret(name, value):
            values[name] = mask_text(value, name)[:_LONGEST].encode("utf-8", "backslashreplace").decode()
    return values


def variable_may_round(name: str) -> bool:
    """Return True if a recorded variable can change how an operator of torch rounds."""
    return name not in _NO_ROUNDING


def change_by(name: str) -> str | None:
    """Return what a variable can change, in words, or None for one that is not recorded or changes no result."""
    if name in HARMLESS:
        return None
    return next((change for pattern, change in _CHANGES if re.fullmatch(pattern, name)), None)
