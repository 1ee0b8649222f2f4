"""explain_operator: the table names operators that exist, and what it says follows the flags."""

import re
import shlex
from typing import Any

import pytest
import torch

from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.decision.nondeterministic_ops import DOCUMENTED, Explanation, explain_operator, may_vary
from dreplica.environment.determinism import numerics_flags

STRICT = {
    "deterministic_algorithms": True,
    "deterministic_warn_only": False,
    "threads": 1,
    "cudnn_benchmark": False,
    "cudnn_deterministic": True,
    "cudnn_tf32": False,
    "matmul_tf32": False,
    "cublas_workspace_config": ":4096:8",
}
WARN = {**STRICT, "deterministic_warn_only": True}
OFF = {
    **STRICT,
    "deterministic_algorithms": False,
    "cudnn_benchmark": True,
    "cudnn_deterministic": False,
    "cublas_workspace_config": None,
}


def overload_of(name: str) -> str:
    """An operator of a trace that the table's entry covers."""
    if name.count(".") == 2:
        return name
    overloads = getattr(torch.ops.aten, name.removeprefix("aten.")).overloads()
    return f"{name}.{'default' if 'default' in overloads else overloads[0]}"


OPERATORS = {name: overload_of(name) for name in DOCUMENTED}


def explain(operator: str, device_type: str = "cuda", **changes: Any) -> Explanation:
    return explain_operator(operator, device_type, {**STRICT, **changes})


def settings_in(explanation: Explanation) -> list[str]:
    return [line for line in explanation.remedy if line.startswith("--")]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_operator_exists(name: str) -> None:
    assert name.startswith("aten.")
    packet, _, overload = name.removeprefix("aten.").partition(".")
    assert hasattr(torch.ops.aten, packet)
    assert not overload or overload in getattr(torch.ops.aten, packet).overloads()


def test_flags_have_the_names_of_numerics_flags() -> None:
    assert set(STRICT) <= set(numerics_flags())


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("flags", [STRICT, WARN, OFF, {}], ids=["strict", "warn", "off", "unknown"])
def test_every_explanation_reads_and_its_settings_can_be_pasted(device_type: str, flags: dict[str, Any]) -> None:
    lines = set()
    for operator in (*OPERATORS.values(), "aten.relu.default", "mine.fold.default"):
        explanation = explain_operator(operator, device_type, flags)
        assert explanation.text.startswith(operator)
        assert explanation.text.endswith("."), operator
        assert ".." not in explanation.text, operator
        assert explanation.remedy, operator
        lines |= set(settings_in(explanation))
    for line in lines:
        config = load_config(shlex.split(line, comments=True), num_replicas=2)
        for key in re.findall(r"--(\S+)", line):
            section, name = key.split(".")
            assert name in type(getattr(RunConfig(), section)).model_fields
        assert config.determinism is not None


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_flags_that_are_right_are_not_offered(operator: str) -> None:
    right = {**STRICT, "cublas_workspace_config": ":16:8"}  # the one that cuDNN's recurrent layers accept, too
    assert settings_in(explain_operator(operator, "cuda", right)) == []
    assert settings_in(explain_operator(operator, "cpu", right)) == []


def test_an_operator_that_strict_mode_makes_deterministic() -> None:
    found = explain("aten.index_add_.default", deterministic_algorithms=False)
    assert found == Explanation(
        True,
        "aten.index_add_.default on CUDA adds with atomics, in whatever order its threads arrive; on this replica "
        "deterministic_algorithms was False, deterministic_warn_only was False, so it was not told to be "
        "deterministic.",
        ["--determinism.mode strict"],
    )
    right = explain("aten.index_add_.default")
    assert "deterministic_algorithms was True" in right.text
    assert "should make it deterministic" in right.text
    assert "another device" in right.remedy[0]
    assert settings_in(explain("aten.index_add_.default", deterministic_warn_only=True)) == []  # warn mode suffices


def test_an_operator_that_no_setting_makes_deterministic() -> None:
    for flags in ({"deterministic_warn_only": True}, {"deterministic_algorithms": False}):
        found = explain("aten._adaptive_avg_pool2d_backward.default", **flags)
        assert found.known
        assert "no setting makes it deterministic" in found.text
        assert found.remedy[0].startswith("instead of it, use x.mean((-2, -1))")
        assert found.remedy[1].startswith("--determinism.mode strict  # stops")
    strict = explain("aten._adaptive_avg_pool2d_backward.default")
    assert "should have raised" in strict.text
    assert settings_in(strict) == []


def test_attention_heeds_strict_mode_only() -> None:
    backward = "aten._scaled_dot_product_flash_attention_backward.default"
    assert explain(backward, deterministic_warn_only=True).remedy == ["--determinism.mode strict"]
    assert settings_in(explain(backward)) == []


@pytest.mark.parametrize("operator", ["aten.convolution.default", "aten.convolution_backward.default"])
def test_convolutions_are_cudnns_flags(operator: str) -> None:
    both = explain_operator(operator, "cuda", OFF)
    assert both.remedy == ["--determinism.cudnn_deterministic true", "--determinism.cudnn_benchmark false"]
    assert "cudnn_benchmark was True" in both.text
    assert explain(operator, cudnn_benchmark=True).remedy == ["--determinism.cudnn_benchmark false"]
    # Deterministic algorithms ask cuDNN for deterministic ones, whatever its own flag says.
    assert settings_in(explain(operator, cudnn_deterministic=False)) == []
    tf32 = explain(operator, cudnn_benchmark=True, cudnn_tf32=True)
    assert tf32.remedy[-1].startswith("--determinism.tf32 false")
    assert not explain(operator, "cpu").known


def test_matrix_products_are_cublas_workspace() -> None:
    off = explain_operator("aten.addmm.default", "cuda", OFF)
    assert "CUBLAS_WORKSPACE_CONFIG was not set" in off.text
    assert off.remedy == ["--determinism.mode strict --determinism.cublas_workspace_config :4096:8"]
    foreign = explain("aten.mm.default", cublas_workspace_config=":0:0")
    assert foreign.remedy[0].startswith("unset CUBLAS_WORKSPACE_CONFIG")
    assert foreign.remedy[1] == "--determinism.cublas_workspace_config :4096:8"
    assert settings_in(explain("aten.bmm.default")) == []
    config = load_config(shlex.split(foreign.remedy[1]), num_replicas=1)
    assert config.determinism.cublas_workspace_config == ":4096:8"


@pytest.mark.parametrize("operator", ["aten._addmm_activation.default", "aten._scaled_mm.default"])
def test_products_with_something_more_are_cublas_workspace_too(operator: str) -> None:
    assert "CUBLAS_WORKSPACE_CONFIG was not set" in explain_operator(operator, "cuda", OFF).text
    assert may_vary(operator, "cuda", OFF)
    assert not may_vary(operator, "cuda", STRICT)


def test_batched_products_of_sparse_matrices_are_a_matter_of_the_mode() -> None:
    """Documented of torch.bmm "when called on sparse-dense CUDA tensors", besides what cuBLAS says of dense ones."""
    found = explain("aten.bmm.default", deterministic_algorithms=False)
    assert found.remedy == ["--determinism.mode strict"]
    assert "deterministic_algorithms was False, which decides for sparse ones" in found.text
    assert settings_in(explain("aten.bmm.default")) == []
    neither = explain_operator("aten.bmm.default", "cuda", OFF)
    assert neither.remedy == ["--determinism.mode strict --determinism.cublas_workspace_config :4096:8"]


@pytest.mark.parametrize("operator", ["aten.put_.default", "aten.put.default"])
def test_put_on_the_cpu_is_deterministic_in_strict_mode_where_it_accumulates(operator: str) -> None:
    strict = explain(operator, "cpu")
    assert "should make it deterministic or stop the run" in strict.text
    assert "no setting" not in strict.text
    loose = explain(operator, "cpu", deterministic_algorithms=False)
    assert "no setting" not in loose.text
    assert loose.remedy[0] == "--determinism.mode strict"


def test_recurrent_layers_need_a_workspace_of_their_own() -> None:
    found = explain("aten._cudnn_rnn.default")
    assert found.remedy[-1] == "--determinism.cublas_workspace_config :16:8"
    assert settings_in(explain("aten._cudnn_rnn.default", cublas_workspace_config=":16:8")) == []


def test_the_device_matters() -> None:
    assert explain("aten.index_put_.default", "cpu", deterministic_algorithms=False).known
    on_cpu = explain("aten.index_add_.default", "cpu", deterministic_algorithms=False, threads=4)
    assert not on_cpu.known
    assert (
        "not among the operators that PyTorch documents as nondeterministic on the CPU (it is on CUDA)" in on_cpu.text
    )
    assert on_cpu.remedy[:2] == ["--determinism.mode strict", "--determinism.threads 1"]
    assert "memtester" in on_cpu.remedy[-1]
    assert "nvidia-smi" in explain("aten.relu.default", "cuda").remedy[-1]


def test_on_the_cpu_onednn_is_left_out_first_where_it_may_have_computed() -> None:
    """torch 2.15's bf16 gradient of a 3x3 convolution over 1x1 pixels, channels last, varies, in strict mode, too."""
    operator = "aten.convolution_backward.default"
    found = explain(operator, "cpu", onednn=True)
    assert "oneDNN" in found.text
    assert found.remedy[0].startswith("--determinism.onednn false")
    assert "memtester" in found.remedy[-1]
    for others in (explain(operator, "cpu", onednn=False), explain("aten.index_add_.default", "cpu", onednn=True)):
        assert "oneDNN" not in others.text
        assert not any("onednn" in line for line in others.remedy)


def test_overloads_that_are_deterministic_are_not_blamed() -> None:
    assert explain("aten.median.dim").known
    assert not explain("aten.median.default").known
    assert explain("aten.scatter.src").known
    assert not explain("aten.scatter.value").known


def test_operators_that_draw() -> None:
    for operator in ("aten.native_dropout.default", "aten.bernoulli_.float"):
        found = explain(operator)
        assert not found.known
        assert "draws random numbers" in found.text
        assert "torch.Generator" in found.remedy[0]


def test_custom_operators() -> None:
    found = explain("torchvision._roi_align_backward.default")
    assert not found.known
    assert "the code that registers 'torchvision'" in found.text
    assert any("compute-sanitizer" in line for line in found.remedy)
    assert not any("compute-sanitizer" in line for line in explain("mine.fold.default", "cpu").remedy)
    assert settings_in(found) == []


def test_a_name_that_no_torch_has() -> None:
    found = explain("aten.no_such_operator.default")
    assert not found.known
