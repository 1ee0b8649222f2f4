"""The command itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreplica.commands.main import main
from tests.harness import REPOSITORY, environment


@pytest.mark.parametrize("name", ["train", "burn-in", "bench", "flags", "certify-resume"])
def test_help_of_a_command_that_trains_has_its_options_and_every_setting(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: dreplica {name} [--replicas N] [--config FILE]")
    assert "--replicas N" in printed.split("usage:")[1].partition("\n")[2]
    assert "--data.batch_size" in printed


def test_a_setting_given_to_a_command_that_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--train.epochs=2"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --train.epochs=2" in capsys.readouterr().err


def test_whoever_has_read_enough_of_it_may_leave() -> None:
    command = [sys.executable, "-m", "dreplica.commands.main", "train", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


@pytest.mark.parametrize(
    "command", [["train"], ["cases", "racy_sum"], ["compare", "a", "b"]], ids=lambda command: command[0]
)
def test_interrupted_while_it_imports_it_says_so_in_one_line(command: list[str]) -> None:
    code = "import dreplica.commands.main, sys; print(flush=True); sys.exit(dreplica.commands.main.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.02)  # argparse is done with, and torch, NumPy or rich are not
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "error: interrupted\n"
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_certificate_that_is_interrupted_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dreplica.commands.main", "certify-resume", "--at-step=7", "--replicas=1"]
    job = [f"--keep={tmp_path / 'kept'}", "--data.num_workers=0", "--train.epochs=1000", "--data.batch_size=8"]
    process = subprocess.Popen(
        [*command, *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    log = tmp_path / "kept" / "straight.log"
    while not (log.exists() and "run folder" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "error: interrupted\n"
    assert process.returncode == 1
    lines = [Path(entry.path, "cmdline") for entry in os.scandir("/proc") if entry.name.isdigit()]
    assert not [path for path in lines if path.exists() and str(tmp_path).encode() in path.read_bytes()]
