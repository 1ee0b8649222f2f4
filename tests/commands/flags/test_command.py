"""`dreplica flags`: rejected jobs, and the whole command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreplica.commands import main as cli
from dreplica.errors import ExitCode
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, environment


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--modell={}",), "Did you mean 'model'"),
        (("--seed.model=distinct",), "seed.model: expected one seed for all replicas, got 'distinct'"),
        (
            ("--overrides={1: {optim: {lr: 1}}}",),
            "overrides: {1: {'optim': {'lr': 1}}} makes replicas differ with any flags.",
        ),
        (("--inject=[{replica: 0, step: 1, target: weights}]",), "Remove it with --inject []"),
    ],
)
def test_jobs_with_different_replicas_are_rejected(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["flags", *SMALL, *arguments]) == ExitCode.UNUSABLE
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("error:") == 1


def test_keep_must_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert cli.main(["flags", *SMALL, f"--keep={tmp_path}"]) == ExitCode.UNUSABLE
    assert "is not empty. Use a new or empty folder." in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_flags_finds_needed_mode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    job = [token for token in SMALL if "model.factory" not in token]
    factory = "--model.factory=tests.commands.flags.needing:mode"
    options = ("--replicas=1", "--steps=4", "--rounds=1", "--json")
    assert cli.main(["flags", *options, *job, factory]) == ExitCode.AGREED
    found = json.loads(capsys.readouterr().out)
    assert found["smallest"]["flags"] == ["mode"]
    assert found["flags"]["mode"]["parted"]["operator"] == "needing.noise.default"
    assert found["flags"]["mode"]["step_time_to_strict"]["max"] < 1, "it takes longer in strict mode"
    assert found["everything_off"]["parted"]["between"] == "repetitions"


@pytest.mark.process
@pytest.mark.cluster
def test_flags_names_a_failing_replica(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    job = [token for token in SMALL if "model.factory" not in token]
    failing = "--model.factory=dreplica.commands.cases.samples.models:fails_on_third_step"
    assert cli.main(["flags", "--replicas=2", *job, failing]) == ExitCode.FAILED
    words = "strict: exit code 1:\nreplica 1 was lost: raised RuntimeError: out of memory, say\n"
    assert capsys.readouterr().err == f"error: {words}"


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_terminates_all_starts(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dreplica.commands.main",
        "flags",
        *SMALL,
        "--train.epochs=1000000",
        "--steps=1000000",
    ]
    command = [token for token in command if token != "--train.epochs=2"]
    keep = tmp_path / "kept"
    process = subprocess.Popen(
        [*command, f"--keep={keep}"], cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True
    )
    trace = keep / "001" / "trace.jsonl"
    while process.poll() is None and not (trace.exists() and trace.stat().st_size):
        time.sleep(0.1)
    workers = _of_the_job(keep)
    assert len(workers) == 3, "the launcher and its replicas"
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == ExitCode.FAILED
    assert printed == "error: interrupted; all starts were terminated\n"
    assert _of_the_job(keep) == []


def _of_the_job(folder: Path) -> list[int]:
    """Return the processes whose command line names the folder, except the command itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if re.search(rb"--folder=" + re.escape(os.fsencode(folder)), words):
            found.append(int(path.parent.name))
    return found
