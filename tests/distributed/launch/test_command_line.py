"""The command that a user typed to start the workers."""

import os
import shutil

import pytest

from dreplica.distributed.launch import command_line
from dreplica.distributed.launch.command_line import launch_command, typed_command, with_option

TORCHRUN = shutil.which("torchrun") or "/opt/bin/torchrun"


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["/usr/bin/python3", TORCHRUN, "--standalone", "train.py"], ["torchrun", "--standalone", "train.py"]),
        (["python", "/elsewhere/torchrun", "train.py"], ["/elsewhere/torchrun", "train.py"]),
        (["python3.11", "-m", "torch.distributed.run", "a.py"], ["python3.11", "-m", "torch.distributed.run", "a.py"]),
        (["python", "/elsewhere/dreplica", "train", "--a", "2"], ["/elsewhere/dreplica", "train", "--a", "2"]),
        (["python", "-m", "dreplica.commands.main", "train"], ["python", "-m", "dreplica.commands.main", "train"]),
        (["python", "-m", "dreplica.commands.main", "cases"], None),
        (["python", "-m", "other.module", "train"], None),
        (["python", "/elsewhere/dreplica", "burn-in"], None),
        (["python", "/elsewhere/dreplica"], None),
        (["python", "-c", "import x"], None),
        (["python", "train.py"], None),
        (["python"], None),
        (["/usr/bin/bash", "-c", "torchrun train.py"], None),
        (["slurmstepd: [1.0]"], None),
        ([], None),
    ],
)
def test_typed_command_drops_the_interpreter(arguments: list[str], typed: list[str] | None) -> None:
    assert typed_command(arguments) == typed


def test_launch_command_reads_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(command_line, "typed_command", seen.append)
    launch_command()
    monkeypatch.setattr(os, "getppid", lambda: 2**30)
    assert launch_command() is None, "the parent is gone"
    assert len(seen) == 1
    assert seen[0]


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        (["t", "--a", "1"], ["t", "--a", "1", "--run.resume", "auto"]),
        (["t", "--run.resume", "never", "--a", "1"], ["t", "--a", "1", "--run.resume", "auto"]),
        (["t", "--run.resume=never", "--a=1"], ["t", "--a=1", "--run.resume", "auto"]),
    ],
)
def test_with_option_replaces_a_value(command: list[str], changed: list[str]) -> None:
    assert with_option(command, "--run.resume", "auto") == changed
