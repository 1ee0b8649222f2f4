"""Differences between the configs and environments of two run folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace.report_records import RunInfo
from dreplica.agreement.trace.run_metadata import (
    RunDifference,
    config_differences,
    fold_distributions,
    manifest_differences,
    read_run,
)
from dreplica.agreement.trace.run_report import RunReport
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


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (["runs/a"], []),
        (["./runs/a/"], []),
        (["runs"], []),  # the folder of all runs, of which this is one
        (["--out=runs/a"], []),
        (["--out", "runs/a", "--lr", "1"], ["--lr", "1"]),
        (["--lr=1", "runs/a"], ["--lr=1"]),
        (["runs/a/sub"], ["runs/a/sub"]),
        (["runs/ab"], ["runs/ab"]),
        (["a"], ["a"]),  # may be a seed, a variant or a name
        (["."], ["."]),
        ([""], [""]),
        (["--lr=0.1"], ["--lr=0.1"]),
        ([3], [3]),
    ],
)
def test_read_run_omits_arguments_that_name_the_run(
    arguments: list[Any], read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one script have different folders, which is no difference between the runs."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs", "a")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps([{"replica": 0, "argv": ["runs/a", *arguments]}]))
    assert read_run(folder).manifests == [{"replica": 0, "argv": ["runs/a", *read]}]
    RunReport(verdict=Verdict(True, "none", "1 replica"), run=RunInfo(name="a", folder="runs/a")).write(folder)
    moved = folder.rename("moved")
    assert read_run(moved).manifests == [{"replica": 0, "argv": ["runs/a", *read]}]


def test_run_of_custom_loop_has_manifest_and_no_config(tmp_path: Path) -> None:
    assert not read_run(tmp_path).is_of_custom_loop
    (tmp_path / "manifest.json").write_text(json.dumps(row()))
    assert read_run(tmp_path).is_of_custom_loop
    (tmp_path / "config.yaml").write_text("{")
    assert not read_run(tmp_path).is_of_custom_loop


def row(**changes: Any) -> list[dict[str, Any]]:
    """Return the manifest of a run from a custom loop, with one replica."""
    manifest: dict[str, Any] = {
        "host": "a",
        "argv": ["train.py", "--lr", "0.1", "--amp"],
        "script": "1" * 32,
        "commit": {"sha": "a" * 40, "dirty": False, "diff": None},
        "packages": {"numpy": "2.1.0"},
        "numerics": {"threads": 1},
        "variables": {"MKL_CBWR": None},
        "distributions": {"numpy": "2.1.0", "scipy": "1.0"},
    }
    return [{"replica": 0, **manifest, **changes}]


DIRTY = {"sha": "a" * 40, "dirty": True, "diff": "b" * 32}


@pytest.mark.parametrize(
    ("changes", "text", "matters"),
    [
        ({"host": "b"}, 'host: "a" and "b"', False),
        ({"distributions": {"numpy": "2.1.0", "scipy": "1.1"}}, 'distributions.scipy: "1.0" and "1.1"', True),
        ({"distributions": {"numpy": "2.1.0"}}, 'distributions.scipy: "1.0" and null', True),
        ({"variables": {"MKL_CBWR": "AVX2"}}, 'variables.MKL_CBWR: null and "AVX2"', True),
        ({"variables": {"MKL_CBWR": None, "A": "1"}}, 'variables.A: null and "1"', True),
        (
            {"variables": {"MKL_CBWR": None, "CUDA_VISIBLE_DEVICES": "1"}},
            'variables.CUDA_VISIBLE_DEVICES: null and "1"',
            False,
        ),
        (
            {"commit": {"sha": "c" * 40, "dirty": False, "diff": None}},
            'commit: "aaaaaaaaaaaa" and "cccccccccccc"',
            True,
        ),
        ({"commit": DIRTY}, 'commit: "aaaaaaaaaaaa" and "aaaaaaaaaaaa, with changes bbbbbbbbbbbb"', True),
        (
            {"commit": {**DIRTY, "diff": None}},
            'commit: "aaaaaaaaaaaa" and "aaaaaaaaaaaa, with changes (not read)"',
            True,
        ),
        (
            {"commit": {"sha": "c" * 40, "dirty": None, "diff": None}},
            'commit: "aaaaaaaaaaaa" and "cccccccccccc, changes unknown"',
            True,
        ),
        ({"commit": None}, 'commit: "aaaaaaaaaaaa" and null', False),
        ({"script": None}, f'script: "{"1" * 32}" and null', True),
        ({"argv": ["train.py", "--lr", "0.2", "--amp"]}, 'argv: "--lr 0.1" and "--lr 0.2"', True),
        ({"argv": ["train.py", "--lr", "0.1"]}, 'argv: "--amp" and ""', True),
        ({"argv": ["/x/train.py", "--lr", "0.1", "--amp"]}, 'argv: "train.py" and "/x/train.py"', False),
        ({"argv": []}, 'argv: "train.py --lr 0.1 --amp" and ""', True),
    ],
)
def test_difference_of_two_custom_loops(changes: dict[str, Any], text: str, matters: bool) -> None:
    (found,) = manifest_differences(row(), row(**changes))
    assert (str(found), found.matters) == (text, matters)
    assert manifest_differences(row(**changes), row(**changes)) == []


def test_arguments_are_left_out_with_a_config() -> None:
    other = row(host="b", argv=["train.py", "--run.name", "b"], script="2" * 32)
    assert [item.field for item in manifest_differences(row(), other, configured=True)] == ["host"]


def test_fields_of_one_version_are_not_compared() -> None:
    """A manifest of an earlier version has no script, and no row for a variable or flag that is new."""
    (old,) = row()
    for field in ("argv", "script", "commit", "distributions"):
        del old[field]
    old["variables"] = {}
    old["numerics"] = {"threads": 1, "no_longer_recorded": True}
    new = row(numerics={"threads": 1, "new": 1})
    assert manifest_differences([old], new) == manifest_differences(new, [old]) == []
    assert [item.field for item in manifest_differences([{**old, "host": "b"}], new)] == ["host"]


def test_unread_changes_are_no_difference() -> None:
    """On a slow disk, git may not list the changes in time."""
    unread = row(commit={"sha": "a" * 40, "dirty": None, "diff": None})
    assert manifest_differences(row(), unread) == manifest_differences(unread, row(commit=DIRTY)) == []


def test_package_is_compared_once() -> None:
    other = row(packages={"numpy": "1.26.4"}, distributions={"numpy": "1.26.4", "scipy": "1.0"})
    assert [str(item) for item in manifest_differences(row(), other)] == ['packages.numpy: "2.1.0" and "1.26.4"']


def test_replicas_of_different_commits_are_listed() -> None:
    two = [*row(), *row(commit=DIRTY)]
    (found,) = manifest_differences(row(), two)
    assert found.other == ["aaaaaaaaaaaa", "aaaaaaaaaaaa, with changes bbbbbbbbbbbb"]


@pytest.mark.parametrize("damaged", [{"commit": "x"}, {"commit": {}}, {"argv": "x"}, {"argv": [1]}, {"variables": 3}])
def test_damaged_manifest_is_compared_nevertheless(damaged: dict[str, Any]) -> None:
    assert manifest_differences(row(), row(**damaged))


def test_many_distributions_are_folded() -> None:
    names = [f"package-{i:02}" for i in range(30)] + ["triton"]
    one, other = (row(distributions=dict.fromkeys(names, version)) for version in ("1", "2"))
    items = manifest_differences(one, [{**other[0], "host": "b"}])
    assert len(items) == 32
    folded = fold_distributions(items)
    assert [item.field for item in folded][::11] == ["host", "distributions"]
    assert "distributions.triton" in [item.field for item in folded]
    assert str(folded[-1]) == 'distributions: "21 more that differ" and "21 more that differ"'
    assert fold_distributions(items[:12]) == items[:12]
