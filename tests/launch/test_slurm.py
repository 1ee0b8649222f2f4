"""launch/slurm.sbatch on a real Slurm: a requeued run ends like an uninterrupted one."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import SMALL
from tests.harness import Job, run_job
from tests.launch.cluster import Cluster, SlurmJob, cluster, free_ports, missing
from tests.launch.recorded import Calls
from tests.launch.slow import NUM_EPOCHS

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(300),
    pytest.mark.cluster,
    pytest.mark.xdist_group("slurm"),  # one cluster at a time
]

BASE = [setting for setting in SMALL if not setting.startswith(("--train.epochs", "--model.factory"))]
SLOW = (*BASE, f"--train.epochs={NUM_EPOCHS}", "--model.factory=tests.launch.slow:until_requeued")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as result:
        yield result


@pytest.fixture(scope="module")
def limited(slurm: Cluster) -> SlurmJob:
    """A job that reaches its time limit while the other tests run, since Slurm checks only twice a minute."""
    return slurm.submit("limited", "--time=1", "--signal=B:USR2@5", settings=shlex.join(SLOW))


@pytest.fixture(scope="module")
def uninterrupted() -> Job:
    return run_job(*SMALL, f"--train.epochs={NUM_EPOCHS}")


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def assert_resumed(job: SlurmJob, expected: Job) -> None:
    """Assert that the job was interrupted once and has the results of an uninterrupted run."""
    state, report = job.wait(), report_of(job.folder)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log
    assert [path.name for path in job.root.iterdir() if path.is_dir()] == ["job"]
    assert 0 < report["run"]["resumed_from"] < 5 * NUM_EPOCHS
    assert (job.folder / "trace.jsonl").read_text().splitlines() == expected.trace
    for key in ("verdict", "fingerprints", "epochs", "steps_checked"):
        assert report[key] == expected.report[key]


def test_two_nodes_agree(slurm: Cluster, limited: SlurmJob) -> None:
    job = slurm.submit("plain", settings=shlex.join(SMALL))
    state = job.wait()
    assert (state["JobState"], state["ExitCode"], state["NumNodes"]) == ("COMPLETED", "0:0", "2"), job.log
    report = report_of(job.folder)
    assert report["verdict"]["summary"] == "2 replicas, 10 steps: bit-identical"
    assert (job.folder / "trace.jsonl").read_text().splitlines() == run_job(*SMALL).trace


@pytest.mark.parametrize("code", [2, 3, 4])
def test_job_returns_the_exit_code_of_the_replicas(slurm: Cluster, limited: SlurmJob, code: int) -> None:
    calls = Calls(slurm.folder / f"calls-{code}", code)
    job = slurm.submit(f"code-{code}", settings="", **calls.environment(slurm.environment["PATH"]))
    state = job.wait()
    # With 4 and no signal before the time limit, the user stopped the job, so it is not requeued.
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", f"{code}:0", "0"), job.log
    assert sorted(call["--node-rank"] for call in calls.read()) == ["0", "1"]


def test_requeued_job_resumes(slurm: Cluster, limited: SlurmJob, uninterrupted: Job) -> None:
    job = slurm.submit("requeued", settings=shlex.join(SLOW))
    job.wait_until("running", lambda job: job.num_lines > 8)
    slurm.call("scontrol", "requeue", str(job.number))
    job.start_now()
    assert_resumed(job, uninterrupted)


def test_time_limit_saves_a_checkpoint_and_requeues(limited: SlurmJob, uninterrupted: Job) -> None:
    limited.start_now()
    report = report_of(limited.folder)
    assert "stopped with a checkpoint: requeued" in limited.log
    assert re.search(r"stopped on request after step (\d+)", limited.log)
    assert report["run"]["stopped_after"] is not None
    assert_resumed(limited, uninterrupted)


_DETECT = """
import os
from dreplica.distributed.launch.environment import detect_launch
launch = detect_launch(os.environ)
print(launch.launcher or "alone", launch.rank, launch.size, launch.local_rank, launch.local_size, flush=True)
"""


def run_script(slurm: Cluster, name: str, *options: str, body: str) -> list[str]:
    """Run a batch script and return the lines that it prints."""
    folder = slurm.folder / name
    folder.mkdir()
    (folder / "detect.py").write_text(_DETECT)
    (folder / "script").write_text(f"#!/usr/bin/env bash\n{body.replace('DETECT', f'python {folder}/detect.py')}\n")
    output = slurm.call("sbatch", "--parsable", f"--output={folder}/log", *options, f"{folder}/script")
    job = SlurmJob(slurm, int(output), folder)
    job.wait_until("ended", lambda job: job.state["JobState"] in ("COMPLETED", "FAILED"))
    return [line for line in job.log.splitlines() if not line.startswith("srun: ")]


def test_launch_is_detected_only_in_steps(slurm: Cluster, limited: SlurmJob) -> None:
    body = """
DETECT
srun --ntasks=1 --nodes=1 DETECT
srun --ntasks=4 --ntasks-per-node=2 DETECT | sort
srun --ntasks=2 --ntasks-per-node=1 --mpi=pmi2 DETECT | sort
"""
    printed = run_script(slurm, "detected", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", body=body)
    assert printed[:2] == ["alone 0 1 0 1"] * 2
    assert printed[2:6] == ["srun 0 4 0 2", "srun 1 4 1 2", "srun 2 4 0 2", "srun 3 4 1 2"]
    assert [line.split()[1:] for line in printed[6:]] == [["0", "2", "0", "1"], ["1", "2", "0", "1"]]


def test_srun_starts_each_replica(slurm: Cluster, limited: SlurmJob) -> None:
    settings = shlex.join([*SMALL, f"--run.root={slurm.folder}/steps", "--run.name=job"])
    address = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_ports(1)[0]}"
    body = f"""
srun --ntasks=2 --ntasks-per-node=1 python train.py {settings} 2>&1 | sort
echo "code ${{PIPESTATUS[0]}}"
env {address} srun --ntasks=2 --ntasks-per-node=1 python train.py {settings}
"""
    printed = run_script(slurm, "steps", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", body=body)
    without = printed[: printed.index("code 2")]
    errors = [line for line in without if line.startswith("error: ")]
    assert len(errors) >= 1
    assert all("srun started 2 processes (SLURM_STEP_NUM_TASKS=2), but MASTER_ADDR and" in line for line in errors)
    assert report_of(slurm.folder / "steps" / "job")["verdict"]["summary"] == "2 replicas, 10 steps: bit-identical"
