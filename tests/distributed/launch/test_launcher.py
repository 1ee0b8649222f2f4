"""The launcher's own output."""

from pathlib import Path

from dreplica.distributed.launch.background import run_in_background
from dreplica.errors import ExitCode


def test_launcher_names_a_killed_worker(tmp_path: Path) -> None:
    ended = run_in_background("tests.launch.dying", [], 1, tmp_path / "log", timeout=60)
    assert (ended.code, ended.output) == (ExitCode.FAILED, "replica 0 was terminated by SIGKILL\n")
