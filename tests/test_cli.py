"""The command itself."""

import subprocess
import sys

import pytest

from dreplica.cli import main
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
    command = [sys.executable, "-m", "dreplica.cli", "train", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1
