"""A replica that is lost ends the run within seconds, and the report names it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dreplica.errors import ExitCode
from dreplica.training.checkpoint.file_format import checkpoint_name, list_checkpoints
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, Job, environment, run_job, run_workers, torchrun, torchrun_command

LOSING = (*SMALL, "--model.factory=tests.end_to_end.losing:LosingModel")
HANG_SECONDS = 60.0
"""Seconds after which a job counts as hanging. On an idle machine, less than torchrun's timeout of 30 s suffices."""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Yield the root of the run folder, and check that no process with it in its command line is left."""
    yield tmp_path
    deadline = time.monotonic() + 10
    while (left := processes_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def processes_with(marker: str) -> list[int]:
    """Return the processes with `marker` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # the process has ended meanwhile
    return found


def lose(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    what: str,
    *arguments: str,
    num_replicas: int = 3,
    start: Callable[..., Job] = run_job,
) -> Job:
    monkeypatch.setenv("LOSE", what)
    return start(*LOSING, *arguments, root=root, num_replicas=num_replicas, timeout=HANG_SECONDS)


def assert_names(job: Job, lost: list[int]) -> str:
    """Check that the report names the lost replicas and the step. Return the texts of the evidence."""
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"]) == (False, "replica-lost"), job.output
    assert verdict["suspects"] == lost
    assert verdict["remedy"]
    assert [row["replica"] for row in job.report["replicas"]] == list(range(len(job.report["replicas"])))
    # The last step of a replica that stopped responding is known up to one step.
    assert verdict["step"] in ({7} if "raised" in verdict["summary"] else {6, 7, 8})
    assert job.report["steps_checked"] in {5, 6}
    return _evidence(verdict)


def _evidence(verdict: dict[str, Any]) -> str:
    return "\n".join(item["text"] for item in verdict["evidence"])


def test_replica_that_raises_is_named(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    job = lose(monkeypatch, root, "1:raise", start=torchrun)
    assert "replica 1: raised ArithmeticError: the sky fell" in assert_names(job, [1])
    assert job.exitcodes == {0: 1, 1: 1, 2: 1}
    ours = job.stderr.partition("Sending process")[0].partition("failed (exitcode")[
        0
    ]  # the part before torchrun's own output
    assert ours.count("Traceback (most recent call last)") == 1  # only its own, none of the survivors'
    assert "in forward\n" in ours
    assert "ArithmeticError: the sky fell\n" in ours

    remedy = job.report["verdict"]["remedy"][-1]
    assert (remedy["code"], remedy["data"]["step"]) == ("resume", 5)
    command = shlex.split(remedy["command"])
    assert command == torchrun_command(*LOSING, root=root, num_replicas=3)
    monkeypatch.setenv("LOSE", "none:raise")
    resumed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((job.folder / "report.json").read_text())["run"]["resumed_from"] == 5


@pytest.mark.parametrize("lost", [0, 2])
def test_replica_that_is_killed_is_named(monkeypatch: pytest.MonkeyPatch, root: Path, lost: int) -> None:
    job = lose(monkeypatch, root, f"{lost}:kill", "--data.num_workers=1")
    assert f"replica {lost}: no response: the process was killed" in assert_names(job, [lost])
    assert job.exitcodes == {0: 1, 1: 1, 2: 1} | {lost: -9}


def test_replica_that_exits_is_named(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    job = lose(monkeypatch, root, "1:vanish")
    assert "replica 1: no response: the process was killed" in assert_names(job, [1])
    assert job.exitcodes == {0: 1, 2: 1}


@pytest.mark.parametrize(("way", "reason"), [("raise", "ArithmeticError: the sky fell"), ("exit", "SystemExit: 0")])
def test_all_replicas_fail_alike(monkeypatch: pytest.MonkeyPatch, root: Path, way: str, reason: str) -> None:
    job = lose(monkeypatch, root, f"*:{way}", num_replicas=2)
    verdict = job.report["verdict"]
    assert verdict["cause"] == "replica-lost"
    assert verdict["suspects"]  # the first to fail, or all
    assert reason in _evidence(verdict)
    assert set(job.exitcodes.values()) == {1}
    assert set(job.exitcodes) == {0, 1}
    assert "Traceback (most recent call last)" in job.output
    assert reason in job.output


def test_replica_that_fails_at_the_build_is_named(root: Path) -> None:
    arguments = [*SMALL, "--model.factory=tests.end_to_end.losing:build_fails"]
    job = run_job(*arguments, root=root, timeout=HANG_SECONDS)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("replica-lost", [0], None)
    assert "replica 0: raised MemoryError: out of host memory" in _evidence(verdict).splitlines()
    assert "before the first step" in verdict["summary"]
    assert job.exitcodes == {0: 1, 1: 1}
    assert (job.folder / "config.yaml").exists()


def test_divergence_sets_exit_code_of_all_workers(root: Path) -> None:
    job = run_job(*SMALL, "--seed.model=null", root=root)
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    assert job.report["verdict"]["cause"] == "build-not-seeded"
    assert "Traceback" not in job.output


def test_lost_rank_0_that_holds_the_store_is_named(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("LOSE", "0:kill")
    job = run_workers([LOSING] * 3, root, rank_0_holds_store=True, timeout=HANG_SECONDS)
    assert "replica 0: " in assert_names(job, [0])
    assert job.exitcodes == {0: -9, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("launcher", "number"),
    [pytest.param("torchrun", signal.SIGINT, marks=pytest.mark.cluster), ("dreplica", signal.SIGTERM)],
)
def test_stopped_job_ends_at_the_same_step(root: Path, launcher: str, number: signal.Signals) -> None:
    command = torchrun_command(*SMALL, "--train.epochs=100000", root=root)
    if launcher == "dreplica":
        settings = command[command.index(str(REPOSITORY / "train.py")) + 1 :]
        command = [sys.executable, "-m", "dreplica.commands.main", "train", "--replicas=2", *settings]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )
    try:
        trace = root / "job" / "trace.jsonl"
        deadline = time.monotonic() + HANG_SECONDS
        while not (trace.exists() and len(trace.read_text().splitlines()) > 5):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: torchrun and the workers
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=25)  # torchrun kills after 30 s
    finally:
        process.kill()
    report = json.loads((root / "job" / "report.json").read_text())
    assert report["verdict"]["cause"] == "none", output
    assert "stopped on request after step" in report["verdict"]["summary"]
    one, two = report["fingerprints"]
    assert one["weights"] == two["weights"]
    assert report["run"]["stopped_after"] == int(report["verdict"]["summary"].rpartition(" ")[2])
    newest = list_checkpoints(root / "job" / "checkpoints")[0]
    assert newest.name == checkpoint_name(report["run"]["stopped_after"])
    assert process.returncode != 0
    assert "KeyboardInterrupt" not in output
    if launcher == "dreplica":
        assert process.returncode == ExitCode.STOPPED
        assert "Traceback" not in output
