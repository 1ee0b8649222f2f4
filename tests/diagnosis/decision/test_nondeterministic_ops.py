"""explain_operator: the table names existing operators, and its explanations follow the settings."""

import re
import shlex
from typing import Any

import pytest
import torch

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.decision.documented_ops import DOCUMENTED, UNVERIFIED
from dreplica.diagnosis.decision.nondeterministic_ops import Explanation, explain_operator, may_vary
from dreplica.environment.determinism import numerics_flags
from tests.messages import codes, commands, data_of

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
    return [remedy.command or "" for remedy in explanation.remedy if remedy.settings]


@pytest.mark.parametrize("name", [*DOCUMENTED, *UNVERIFIED])
def test_every_operator_exists(name: str) -> None:
    assert name.startswith("aten.")
    packet, _, overload = name.removeprefix("aten.").partition(".")
    assert hasattr(torch.ops.aten, packet)
    assert not overload or overload in getattr(torch.ops.aten, packet).overloads()


def test_flags_have_the_names_of_numerics_flags() -> None:
    assert set(STRICT) <= set(numerics_flags())


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("flags", [STRICT, WARN, OFF, {}], ids=["strict", "warn", "off", "unknown"])
def test_explanations_read_and_settings_can_be_pasted(device_type: str, flags: dict[str, Any]) -> None:
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
def test_correct_settings_are_not_recommended(operator: str) -> None:
    right = {**STRICT, "cublas_workspace_config": ":16:8"}  # the one that cuDNN's recurrent layers accept, too
    assert settings_in(explain_operator(operator, "cuda", right)) == []
    assert settings_in(explain_operator(operator, "cpu", right)) == []


def test_strict_mode_makes_index_add_deterministic() -> None:
    found = explain("aten.index_add_.default", deterministic_algorithms=False)
    assert found == Explanation(
        "documented",
        "aten.index_add_.default on CUDA adds with atomics, in the order in which its threads arrive; on this replica "
        "deterministic_algorithms was False, deterministic_warn_only was False, so no deterministic algorithm was "
        "requested.",
        [Remedy.of("strict-mode")],
    )
    right = explain("aten.index_add_.default")
    assert "deterministic_algorithms was True" in right.text
    assert "should make it deterministic" in right.text
    assert codes(right.remedy) == ["report-to-pytorch"]
    assert settings_in(explain("aten.index_add_.default", deterministic_warn_only=True)) == []  # warn mode suffices


def test_no_setting_makes_adaptive_pooling_deterministic() -> None:
    for flags in ({"deterministic_warn_only": True}, {"deterministic_algorithms": False}):
        found = explain("aten._adaptive_avg_pool2d_backward.default", **flags)
        assert found.known
        assert "no setting makes it deterministic" in found.text
        assert codes(found.remedy) == ["use-instead", "strict-mode-stops"]
        assert data_of(found.remedy, "use-instead")["instead"].startswith("x.mean((-2, -1))")
    strict = explain("aten._adaptive_avg_pool2d_backward.default")
    assert "should have raised an error" in strict.text
    assert settings_in(strict) == []


def test_attention_depends_on_strict_mode_only() -> None:
    backward = "aten._scaled_dot_product_flash_attention_backward.default"
    assert commands(explain(backward, deterministic_warn_only=True).remedy) == ["--determinism.mode strict"]
    assert settings_in(explain(backward)) == []


@pytest.mark.parametrize("operator", ["aten.convolution.default", "aten.convolution_backward.default"])
def test_convolutions_depend_on_cudnn_settings(operator: str) -> None:
    both = explain_operator(operator, "cuda", OFF)
    assert commands(both.remedy) == ["--determinism.cudnn_deterministic true", "--determinism.cudnn_benchmark false"]
    assert "cudnn_benchmark was True" in both.text
    assert commands(explain(operator, cudnn_benchmark=True).remedy) == ["--determinism.cudnn_benchmark false"]
    # Deterministic algorithms select deterministic cuDNN kernels regardless of cuDNN's flag.
    assert settings_in(explain(operator, cudnn_deterministic=False)) == []
    tf32 = explain(operator, cudnn_benchmark=True, cudnn_tf32=True)
    assert tf32.remedy[-1].command == "--determinism.tf32 false"
    assert not explain(operator, "cpu").known


def test_matrix_products_depend_on_cublas_workspace() -> None:
    off = explain_operator("aten.addmm.default", "cuda", OFF)
    assert "CUBLAS_WORKSPACE_CONFIG was not set" in off.text
    assert commands(off.remedy) == ["--determinism.mode strict --determinism.cublas_workspace_config :4096:8"]
    foreign = explain("aten.mm.default", cublas_workspace_config=":0:0")
    command = "--determinism.cublas_workspace_config :4096:8"
    assert commands(foreign.remedy) == ["unset CUBLAS_WORKSPACE_CONFIG", command]
    assert settings_in(explain("aten.bmm.default")) == []
    config = load_config(shlex.split(command), num_replicas=1)
    assert config.determinism.cublas_workspace_config == ":4096:8"


@pytest.mark.parametrize("operator", ["aten._addmm_activation.default", "aten._scaled_mm.default"])
def test_fused_products_depend_on_cublas_workspace(operator: str) -> None:
    assert "CUBLAS_WORKSPACE_CONFIG was not set" in explain_operator(operator, "cuda", OFF).text
    assert may_vary(operator, "cuda", OFF)
    assert not may_vary(operator, "cuda", STRICT)


def test_sparse_batched_products_depend_on_mode() -> None:
    """torch.bmm is documented "when called on sparse-dense CUDA tensors"; for dense ones, cuBLAS decides."""
    found = explain("aten.bmm.default", deterministic_algorithms=False)
    assert commands(found.remedy) == ["--determinism.mode strict"]
    assert "deterministic_algorithms was False, which decides for sparse ones" in found.text
    assert settings_in(explain("aten.bmm.default")) == []
    neither = explain_operator("aten.bmm.default", "cuda", OFF)
    assert commands(neither.remedy) == ["--determinism.mode strict --determinism.cublas_workspace_config :4096:8"]


@pytest.mark.parametrize("operator", ["aten.put_.default", "aten.put.default"])
def test_put_on_cpu_is_deterministic_in_strict_mode(operator: str) -> None:
    strict = explain(operator, "cpu")
    assert "should make it deterministic or stop the run" in strict.text
    assert "no setting" not in strict.text
    loose = explain(operator, "cpu", deterministic_algorithms=False)
    assert "no setting" not in loose.text
    assert loose.remedy[0].command == "--determinism.mode strict"


def test_recurrent_layers_need_another_workspace() -> None:
    found = explain("aten._cudnn_rnn.default")
    assert found.remedy[-1].command == "--determinism.cublas_workspace_config :16:8"
    assert settings_in(explain("aten._cudnn_rnn.default", cublas_workspace_config=":16:8")) == []


def test_explanation_depends_on_device() -> None:
    assert explain("aten.index_put_.default", "cpu", deterministic_algorithms=False).known
    on_cpu = explain("aten.index_add_.default", "cpu", deterministic_algorithms=False, threads=4)
    assert not on_cpu.known
    assert (
        "not among the operators that PyTorch documents as nondeterministic on the CPU (it is on CUDA)" in on_cpu.text
    )
    assert codes(on_cpu.remedy) == ["strict-mode", "one-thread", "test-other-host"]
    assert explain("aten.relu.default", "cuda").remedy[-1].code == "test-other-gpu"


def test_onednn_is_disabled_first_on_cpu() -> None:
    """torch 2.15's bf16 gradient of a channels-last 3x3 convolution over 1x1 pixels varies even in strict mode."""
    operator = "aten.convolution_backward.default"
    found = explain(operator, "cpu", onednn=True)
    assert "oneDNN" in found.text
    assert codes(found.remedy) == ["disable-onednn", "test-other-host"]
    for others in (explain(operator, "cpu", onednn=False), explain("aten.index_add_.default", "cpu", onednn=True)):
        assert "oneDNN" not in others.text
        assert "disable-onednn" not in codes(others.remedy)


def test_deterministic_overloads_are_not_documented() -> None:
    assert explain("aten.median.dim").known
    assert not explain("aten.median.default").known
    assert explain("aten.scatter.src").known
    assert not explain("aten.scatter.value").known


def test_operators_that_draw_are_not_documented() -> None:
    for operator in ("aten.native_dropout.default", "aten.bernoulli_.float"):
        found = explain(operator)
        assert not found.known
        assert "draws random numbers" in found.text
        assert found.remedy[0].code == "use-global-generator"


def test_custom_operators_are_not_documented() -> None:
    found = explain("torchvision._roi_align_backward.default")
    assert not found.known
    assert "the code that registers 'torchvision'" in found.text
    assert "sanitize-custom-operator" in codes(found.remedy)
    assert "sanitize-custom-operator" not in codes(explain("mine.fold.default", "cpu").remedy)
    assert settings_in(found) == []


def test_unknown_operator_is_not_documented() -> None:
    found = explain("aten.no_such_operator.default")
    assert not found.known


@pytest.mark.parametrize("flags", [STRICT, WARN, OFF, {}], ids=["strict", "warn", "off", "unknown"])
@pytest.mark.parametrize("name", UNVERIFIED)
def test_unverified_operator_may_vary_on_cuda(name: str, flags: dict[str, Any]) -> None:
    """With any settings: hardware is not accused where such an operator ran."""
    operator = overload_of(name)
    explanation = explain_operator(operator, "cuda", flags)
    assert (explanation.status, explanation.known) == ("unverified", False)
    assert "This is unverified: PyTorch does not document" in explanation.text
    assert may_vary(operator, "cuda", flags)
    assert not may_vary(operator, "cpu", flags)
    assert explain_operator(operator, "cpu", flags).status == "undocumented"
    assert name not in DOCUMENTED


def test_status_of_documented_and_other_operators() -> None:
    assert explain("aten.histc.default").status == "documented"
    assert explain("aten.relu.default").status == "undocumented"
    assert explain("mine.sum.default").status == "undocumented"
