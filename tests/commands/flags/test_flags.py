"""What it means to give up a flag: the settings of each set, and what to paste for it."""

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


def test_strict_is_the_default_section_whatever_the_jobs_own_mode() -> None:
    own = DeterminismConfig(mode="off", cudnn_benchmark=True, fill_uninitialized_memory=False, threads=3, tf32=True)
    usual = DeterminismConfig(threads=3, tf32=True, cudnn_deterministic=True)
    assert STRICT.section(own) == usual


def test_every_flag_changes_its_own_key_alone() -> None:
    strict = settings_without(frozenset())
    for name in NAMES:
        without = settings_without(frozenset({name}))
        assert [key for key in strict if strict[key] != without[key]] == [name]


def test_filling_has_no_effect_without_the_mode() -> None:
    assert closed({"mode"}) == {"mode", "fill_uninitialized_memory"}
    assert closed({"fill_uninitialized_memory"}) == {"fill_uninitialized_memory"}


@pytest.mark.parametrize("given_up", SETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_what_is_pasted_is_what_was_measured(given_up: frozenset[str], tmp_path: Path) -> None:
    keys, _ = to_paste(given_up, "cuda")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"determinism": dict(keys)}))
    measured = Variant(given_up).section(DeterminismConfig())
    assert load_config([f"--config={tmp_path / 'job.yaml'}"], 1).determinism == measured
    on_command_line = [f"--determinism.{key}={yaml.safe_dump(value).split()[0]}" for key, value in keys.items()]
    assert load_config(on_command_line, 1).determinism == measured


def test_the_workspace_is_left_to_the_environment_where_the_mode_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    without_mode = closed({"mode"})
    assert to_paste(without_mode, "cuda")[1] == [
        "export CUBLAS_WORKSPACE_CONFIG=:4096:8  # mode off leaves it to the environment"
    ]
    assert to_paste(without_mode, "cpu")[1] == []
    assert to_paste(frozenset(), "cuda")[1] == []
    assert Variant(without_mode).variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    given_up = frozenset({"cublas_workspace_config"})
    assert to_paste(given_up, "cuda")[1] == []
    assert Variant(given_up).variables == {"CUBLAS_WORKSPACE_CONFIG": None}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert STRICT.variables == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, "the user's own is as good"
    assert to_paste(given_up, "cuda")[1] == ["unset CUBLAS_WORKSPACE_CONFIG"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert STRICT.variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    line = "unset CUBLAS_WORKSPACE_CONFIG  # cuBLAS is not deterministic with :0:0"
    assert to_paste(frozenset(), "cuda")[1] == [line], "or the preflight refuses it"


@pytest.mark.parametrize("given_up", SETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_what_the_preflight_refuses_is_known_beforehand(
    given_up: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # and put back, whatever is set below
    variant = Variant(given_up)
    section = variant.section(DeterminismConfig())
    refused = section.mode == "strict" and set_environment(section) is not None
    assert (variant.unusable is not None) == refused


def test_options_are_changed_from_the_jobs_own_value_where_they_have_an_effect() -> None:
    own = DeterminismConfig(tf32=True, threads=2)
    on_gpu, left_out = options_on("cuda", own, cpus_per_replica=8)
    assert [variant.option for variant in on_gpu] == [("tf32", False), ("reduced_precision_reduction", True)]
    assert left_out == []
    assert without_effect_on("cuda") == ["threads", "onednn"]
    on_cpu, _ = options_on("cpu", own, cpus_per_replica=8)
    assert [variant.option for variant in on_cpu] == [("threads", 8), ("onednn", False)]
    assert on_cpu[0].section(own) == STRICT.section(own).model_copy(update={"threads": 8})
    _, left_out = options_on("cpu", own, cpus_per_replica=2)
    assert left_out == ["threads: 2 for each replica is as many as there are CPUs for"]
