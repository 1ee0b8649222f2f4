"""Environment variables that are recorded: those that can change results, and no secrets."""

import os

import pytest

from dreplica.environment.variables import HARMLESS, STRICT, change_by, relevant_variables, variable_may_round


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        *("NCCL_ALGO", "NCCL_PROTO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "FLASH_ATTENTION_DETERMINISTIC"),
        *("NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES", "PYTHONHASHSEED", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "CUDA_LAUNCH_BLOCKING"),
        *(
            "LD_PRELOAD",
            "LD_LIBRARY_PATH",
            "PYTHONPATH",
            "OPENBLAS_CORETYPE",
            "KMP_AFFINITY",
            "TORCHINDUCTOR_MAX_AUTOTUNE",
        ),
        *("CUDA_VISIBLE_DEVICES", "TRITON_F32_DEFAULT", "GOMP_CPU_AFFINITY", "CUDNN_CONV_WSCAP_DBG", "NUMBA_CPU_NAME"),
    ],
)
def test_variable_that_can_change_results_is_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name not in relevant_variables()
    monkeypatch.setenv(name, "1")
    assert relevant_variables()[name] == "1"


@pytest.mark.parametrize(
    "name",
    [
        *("HOME", "PATH", "USER", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "TORCH_HOME", "CUDA_HOME"),
        *("TORCHINDUCTOR_CACHE_DIR", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "NCCL_DEBUG", "TORCH_TOKEN"),
        *("TORCH_NCCL_BLOCKING_WAIT", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_API_KEY", "CUDA_PATH", "XLA_SECRET"),
    ],
)
def test_other_variables_and_secrets_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1a2b")
    assert name not in relevant_variables()


def test_strict_variable_has_a_row_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert relevant_variables() == dict.fromkeys(STRICT)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert relevant_variables() == {**dict.fromkeys(STRICT), "MKL_CBWR": "AVX2"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("NCCL_ALGO", "the order of additions in a collective"),
        ("NCCL_PROTO", "the order of additions in a collective"),
        ("NCCL_NVLS_ENABLE", "the order of additions in a collective"),
        ("NCCL_COLLNET_ENABLE", "the order of additions in a collective"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "whether attention is deterministic, and its rounding"),
        ("FLASH_ATTENTION_DETERMINISTIC", "whether attention is deterministic, and its rounding"),
        ("NPY_DISABLE_CPU_FEATURES", "which instructions of the CPU are used, and so the rounding"),
        ("ATEN_CPU_CAPABILITY", "which instructions of the CPU are used, and so the rounding"),
        ("DNNL_MAX_CPU_ISA", "which instructions of the CPU are used, and so the rounding"),
        ("MKL_CBWR", "which instructions of the CPU are used, and so the rounding"),
        ("OPENBLAS_CORETYPE", "which instructions of the CPU are used, and so the rounding"),
        ("OPENBLAS_NUM_THREADS", "how sums are split between threads, and so the rounding"),
        ("GLIBC_TUNABLES", "the rounding of functions such as exp on the CPU"),
        ("NVIDIA_TF32_OVERRIDE", "the precision of matrix products on GPUs"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "the precision of matrix products on GPUs"),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "which kernels are compiled, and so the rounding"),
        ("XLA_FLAGS", "which kernels are compiled, and so the rounding"),
        ("PYTHONHASHSEED", "the order of sets and the value of hash()"),
        ("CUDA_VISIBLE_DEVICES", None),
        ("HOME", None),
    ],
)
def test_change_by_a_variable(name: str, change: str | None) -> None:
    assert change_by(name) == change


def test_every_strict_variable_can_change_something() -> None:
    assert [name for name in STRICT if change_by(name) is None] == []
    assert all(variable_may_round(name) for name in STRICT)


def test_secret_in_a_value_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_CONF", "https://me:password1@host/x")
    monkeypatch.setenv("LD_PRELOAD", "x" * 5000)
    found = relevant_variables()
    assert found["NCCL_CONF"] == "https://***@host/x"
    assert len(found["LD_PRELOAD"] or "") == 1000


def test_variable_of_no_valid_text_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", os.fsdecode(b"/lib/\xff.so"))
    assert (relevant_variables()["LD_PRELOAD"] or "").encode() == rb"/lib/\udcff.so"


def test_only_other_variables_may_round() -> None:
    assert not any(variable_may_round(name) for name in HARMLESS)
    assert all(variable_may_round(name) for name in STRICT)
