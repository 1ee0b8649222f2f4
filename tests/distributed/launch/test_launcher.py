"""What the launcher itself says."""

from pathlib import Path

from dreplica.distributed.launch.background import run_in_background
from dreplica.errors import ExitCode


def test_a_worker_that_is_killed_before_it_says_anything_is_named(tmp_path: Path) -> None:
    code, printed = run_in_background("tests.launch.dying", [], 1, tmp_path / "log", timeout=60)
    assert (code, printed) == (ExitCode.FAILED, "replica 0 was ended by SIGKILL\n")
