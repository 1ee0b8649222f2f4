"""The remedy that resumes a run."""

from pathlib import Path

import pytest

from dreplica.report.record import resume_remedy as module
from dreplica.report.record.resume_remedy import resume_remedy

COMMAND = ["torchrun", "--nproc_per_node=2", "train.py", "--run.name", "my run"]


@pytest.fixture(autouse=True)
def started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch_command", lambda: COMMAND)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)


def test_newest_checkpoint_and_command_are_named(tmp_path: Path) -> None:
    for step in (4, 12):
        (tmp_path / "checkpoints" / f"step_{step:06}").mkdir(parents=True)
    remedy = resume_remedy(tmp_path, "auto")
    assert (remedy.code, remedy.data["step"]) == ("resume", 12)
    assert remedy.command == "torchrun --nproc_per_node=2 train.py --run.name 'my run'"
    assert str(remedy).endswith("run the same command again: it resumes from the checkpoint of step 12")
    assert resume_remedy(tmp_path, "never").command == f"{remedy.command} --run.resume auto"
    assert resume_remedy(tmp_path, "never").code == "resume-with-auto"


def test_run_without_checkpoint_starts_over(tmp_path: Path) -> None:
    assert resume_remedy(tmp_path, "never").code == resume_remedy(tmp_path, "auto").code == "start-over"
    assert resume_remedy(tmp_path, "never").command == "torchrun --nproc_per_node=2 train.py --run.name 'my run'"


def test_unknown_launcher_leaves_the_command_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch_command", lambda: None)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    remedy = resume_remedy(tmp_path, "auto")
    assert remedy.command is None
    assert str(remedy) == "run the same command again on each node: it starts over, since it has no checkpoint"
