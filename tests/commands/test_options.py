"""Options that several commands share: nodes, and hints for mistyped options."""

import argparse

import pytest

from dreplica.commands.main import main
from dreplica.commands.options import read_nodes
from dreplica.errors import UsageError


@pytest.fixture(autouse=True)
def _launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreplica.distributed.launch.launcher.launch", lambda *_: 0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nodes=2"], "--node-rank: required with --nodes 2. Pass a different value from 0 to 1 on each node."),
        (["--nodes=2", "--node-rank=2", "--head=a:1"], "--node-rank: expected a value from 0 to 1, got 2."),
        (["--nodes=2", "--node-rank=1"], "--head: required with --nodes 2."),
        (["--nodes=2", "--node-rank=1", "--head=a"], "--head: expected HOST:PORT, an address of node 0"),
        (["--nodes=2", "--node-rank=1", "--head=a:0"], "--head: expected HOST:PORT, an address of node 0"),
        (["--nodes=2", "--node-rank=1", "--head=a:99999"], "--head: expected HOST:PORT, an address of node 0"),
        (["--nodes=2", "--node-rank=1", "--head=a:²"], "--head: expected HOST:PORT, an address of node 0"),
        (["--node-rank=1"], "--nodes: required with --node-rank."),
        (["--head=a:1"], "--nodes: required with --head."),
    ],
)
def test_read_nodes_refuses_incomplete_options(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text}")
    assert "For example: --nodes 2 --node-rank 0 --head node0:29500." in line


@pytest.mark.parametrize(
    ("arguments", "mistyped", "meant"),
    [
        (["train", "--replica", "3"], "--replica", "--replicas"),
        (["train", "--repicas=3"], "--repicas", "--replicas"),
        (["train", "--noderank", "1"], "--noderank", "--node-rank"),
        (["bench", "--round", "3", "--train.epochs=1"], "--round", "--rounds"),
        (["certify-resume", "--at_step=3"], "--at_step", "--at-step"),
    ],
)
def test_check_settings_suggests_option(
    arguments: list[str], mistyped: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: command line: {mistyped}: unknown option. Did you mean {meant}?\n"


def test_check_settings_accepts_whole_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def launch(_module: str, settings: list[str], _num_replicas: int, _nodes: None) -> int:
        given.extend(settings)
        return 0

    monkeypatch.setattr("dreplica.distributed.launch.launcher.launch", launch)
    settings = ["--replica={factory: null}", "--replica", "null", "--model", "{name: resnet18}", "--optim.lr", "1"]
    assert main(["train", *settings]) == 0
    assert given == settings


@pytest.mark.parametrize("option", ["--nodes", "--node-rank", "--head"])
def test_check_settings_refuses_node_options(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", option, "2"]) == 2
    assert capsys.readouterr().err == f"error: command line: {option}: bench runs on one node. Remove {option}.\n"


@pytest.mark.parametrize("arguments", [["--config", ""], ["--config="]])
def test_check_settings_refuses_empty_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err == "error: command line: --config: the path is empty. Name a YAML file.\n"


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        (
            "train",
            "Add `--nodes 2 --node-rank 1 --head HOST:29500` with a different rank on each node, or unset SLURM_",
        ),
        ("burn-in", "Add `--nodes 2 --node-rank 1 --head HOST:29500` with a different rank on each node, or unset"),
        ("bench", "Start it once, or unset SLURM_PROCID to run it alone."),
        ("flags", "Start it once, or unset SLURM_PROCID to run it alone."),
    ],
)
def test_check_single_launch_refuses_one_of_several(
    command: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would start a run with the same name."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main([command, "--train.epochs=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: srun started 2 processes (SLURM_STEP_NUM_TASKS=2), so that this is one of 2 runs of "
    )
    assert fix in line


def test_check_single_launch_accepts_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["train", "--nodes=2", "--node-rank=1", "--head=a:1"]) == 0
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert main(["train"]) == 0


def test_read_nodes_accepts_explicit_single_node() -> None:
    given = argparse.Namespace(nodes=1, node_rank=0, head="node0:29500")
    assert read_nodes(given) is None  # as launch/node.sh passes them on one node
    with pytest.raises(UsageError, match="--node-rank: expected 0 with --nodes 1, got 1"):
        read_nodes(argparse.Namespace(nodes=1, node_rank=1, head="node0:29500"))


@pytest.mark.parametrize("command", [["report", ""], ["compare", "", "b"], ["cases", "--keep", ""]])
def test_path_argument_refuses_empty(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": the path is empty. See `dreplica {command[0]} --help`.")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_positive_int_refuses_other_values(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--replicas={value}"]) == 2
    expected = f"error: --replicas: expected a positive integer, got {value!r}. See `dreplica train --help`.\n"
    assert capsys.readouterr().err == expected
