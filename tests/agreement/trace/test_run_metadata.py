"""Differences between the configs and environments of two run folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace.run_metadata import RunDifference, config_differences, manifest_differences, read_run
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import RunConfig

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "root": "runs"},
    "optim": {"lr": 0.1, "betas": [0.9, 0.99]},
    "world": {"device": "cpu", "timeout": 300.0},
    "train": {"epochs": 1, "amp": None},
    "overrides": {},
}


def test_config_differences_are_in_order_of_keys() -> None:
    other = {
        **CONFIG,
        "run": {"name": "b", "root": "runs"},
        "optim": {"betas": [0.9, 0.999], "lr": 0.1, "eps": 1e-8},
        "world": {"device": "cuda", "timeout": 5.0},
        "train": {"epochs": 2, "amp": "bf16"},
        "overrides": {1: {"optim": {"lr": 0.2}}},
    }
    assert config_differences(CONFIG, CONFIG) == []
    assert [(item.field, item.one, item.other, item.matters) for item in config_differences(CONFIG, other)] == [
        ("run.name", "a", "b", False),
        ("optim.betas", [0.9, 0.99], [0.9, 0.999], True),
        ("world.device", "cpu", "cuda", True),
        ("world.timeout", 300.0, 5.0, False),
        ("train.epochs", 1, 2, False),
        ("train.amp", None, "bf16", True),
        ("optim.eps", None, 1e-8, True),
        ("overrides.1.optim.lr", None, 0.2, True),
    ]


def test_keys_that_change_no_digest_exist() -> None:
    from dreplica.agreement.trace import run_metadata as recorded_run

    config = RunConfig().model_dump()
    for name in recorded_run._CHANGES_NOTHING:
        section, _, key = name.partition(".")
        assert section in config
        assert not key or key in config[section], name


def test_manifest_differences_ignore_number_of_replicas() -> None:
    row = {"host": "a", "seed": 42, "cpu": {"model": "X"}}
    one = [{"replica": 0, **row}, {"replica": 1, **row}]
    assert manifest_differences(one, [{"replica": 0, **row}]) == []
    other = [{"replica": 0, **row, "cpu": {"model": "Y"}}, {"replica": 1, **row, "host": "b"}]
    assert manifest_differences(one, other) == [
        RunDifference("host", "a", ["a", "b"], matters=False),
        RunDifference("cpu.model", "X", ["Y", "X"], matters=True),
    ]


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_read_run_lists_unreadable_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    verdict = {"agreed": True, "cause": "none", "summary": "2 replicas"}
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "verdict": verdict}))
    run = read_run(tmp_path)
    assert run.config is run.manifests is None
    assert run.report is not None
    assert run.report.verdict == Verdict(True, "none", "2 replicas")
    first, second = run.problems
    assert first.startswith("config.yaml ")
    assert second == "there is no manifest.json"
