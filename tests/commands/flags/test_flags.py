"""Sets of flags: their settings and the lines to paste."""

import itertools
from pathlib import Path

import pytest
import yaml

from dreplica.commands.flags.flags import (
    FLAGS,
    STRICT,
    Variant,
    closed,
    options_on,
    settings_without,
    to_paste,
    without_effect_on,
)
from dreplica.config.load import load_config
from dreplica.config.schema import DeterminismConfig
from dreplica.environment.determinism import set_environment

NAMES = [flag.name for flag in FLAGS]
SETS = sorted({closed(some) for size in range(6) for some in itertools.combinations(NAMES, size)}, key=sorted)


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_strict_variant_ignores_own_mode() -> None:
    own = DeterminismConfig(mode="off", cudnn_benchmark=True, fill_uninitialized_memory=False, threads=3, tf32=True)
    usual = DeterminismConfig(threads=3, tf32=True, cudnn_deterministic=True)
    assert STRICT.section(own) == usual


def test_flag_changes_only_its_own_key() -> None:
    strict = settings_without(frozenset())
    for name in NAMES:
        without = settings_without(frozenset({name}))
        assert [key for key in strict if strict[key] != without[key]] == [name]


def test_closed_adds_filling_to_mode() -> None:
    assert closed({"mode"}) == {"mode", "fill_uninitialized_memory"}
    assert closed({"fill_uninitialized_memory"}) == {"fill_uninitialized_memory"}


@pytest.mark.parametrize("disabled", SETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_pasted_section_is_the_measured_one(disabled: frozenset[str], tmp_path: Path) -> None:
    keys, _ = to_paste(disabled, "cuda")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"determinism": dict(keys)}))
    measured = Variant(disabled).section(DeterminismConfig())
    assert load_config([f"--config={tmp_path / 'job.yaml'}"], 1).determinism == measured
    on_command_line = [f"--determinism.{key}={yaml.safe_dump(value).split()[0]}" for key, value in keys.items()]
    assert load_config(on_command_line, 1).determinism == measured


def test_workspace_is_exported_if_mode_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    without_mode = closed({"mode"})
    assert to_paste(without_mode, "cuda")[1] == [
        "export CUBLAS_WORKSPACE_CONFIG=:4096:8  # mode off leaves it to the environment"
    ]
    assert to_paste(without_mode, "cpu")[1] == []
    assert to_paste(frozenset(), "cuda")[1] == []
    assert Variant(without_mode).variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    disabled = frozenset({"cublas_workspace_config"})
    assert to_paste(disabled, "cuda")[1] == []
    assert Variant(disabled).variables == {"CUBLAS_WORKSPACE_CONFIG": None}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert STRICT.variables == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, "the user's value is deterministic, too"
    assert to_paste(disabled, "cuda")[1] == ["unset CUBLAS_WORKSPACE_CONFIG"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert STRICT.variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    line = "unset CUBLAS_WORKSPACE_CONFIG  # cuBLAS is not deterministic with :0:0"
    assert to_paste(frozenset(), "cuda")[1] == [line], "or the preflight rejects it"


@pytest.mark.parametrize("disabled", SETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_unusable_variant_is_known_without_a_start(disabled: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # and restored after the test
    variant = Variant(disabled)
    section = variant.section(DeterminismConfig())
    refused = section.mode == "strict" and set_environment(section) is not None
    assert (variant.unusable is not None) == refused


def test_options_change_own_values() -> None:
    own = DeterminismConfig(tf32=True, threads=2)
    on_gpu, left_out = options_on("cuda", own, cpus_per_replica=8)
    assert [variant.option for variant in on_gpu] == [("tf32", False), ("reduced_precision_reduction", True)]
    assert left_out == []
    assert without_effect_on("cuda") == ["threads", "onednn"]
    on_cpu, _ = options_on("cpu", own, cpus_per_replica=8)
    assert [variant.option for variant in on_cpu] == [("threads", 8), ("onednn", False)]
    assert on_cpu[0].section(own) == STRICT.section(own).model_copy(update={"threads": 8})
    _, left_out = options_on("cpu", own, cpus_per_replica=2)
    assert left_out == ["threads: 2 per replica already uses all CPUs"]
