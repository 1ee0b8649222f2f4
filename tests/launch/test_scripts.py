"""Job scripts: each runs the same command on each node, with its scheduler's variables for the node's place."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreplica.training.checkpoint.file_format import list_checkpoints
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, environment, run_job
from tests.launch.cluster import free_ports, wait_for
from tests.launch.recorded import Calls

LAUNCH = REPOSITORY / "launch"
NAMES = {"REPLICAS_PER_NODE", "CONFIG", "RUN_NAME", "RUN_ROOT", "SETTINGS", "STOP_SECONDS"}
"""Variables that configure the run in every script."""
GIVEN = {
    "REPLICAS_PER_NODE": "3",
    "CONFIG": "my configs/a.yaml",
    "RUN_NAME": "mine",
    "RUN_ROOT": "/some/runs",
    "SETTINGS": "--optim.lr 0.1 --optim '{name: SGD, lr: 1}'",
    "STOP_SECONDS": "77",
}
_SSH = """#!/usr/bin/env bash
# A fake ssh that runs the command on this host, as a remote shell does.
while [[ "$1" == -* ]]; do shift 2; done
echo "$1" >>{hosts}
shift
exec env -u RUN_NAME -u CONFIG -u SETTINGS -u BURN_IN -u HEAD bash -c "$*"
"""
_PBSDSH = """#!/usr/bin/env bash
[[ "$1" == -n && "$3" == -- ]] || exit 99
shift 3
exec env -i PATH=/usr/bin:/bin "$@"
"""
_QSTAT = """Job Id: 7.server
    Job_Name = job
    queue = big
    Resource_List.ncpus = 128
    Resource_List.place = scatter
    Resource_List.select = 4:ncpus=32:ngpus=8
\t:mpiprocs=1
    Resource_List.walltime = 02:00:00
    Variable_List = PBS_O_HOME=/home/me,
\tPBS_O_WORKDIR=/home/me/dreplica

"""
"""Output of OpenPBS."""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def bare_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without the variables that a script reads."""
    return {key: value for key, value in environment().items() if key not in NAMES | {"HEAD", "NODES"}} | more


def run(*command: str, own: dict[str, str], code: int = 0) -> str:
    process = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


def expected(rank: int, num_nodes: int, head: str) -> dict[str, str]:
    return {
        "command": "train",
        "--nodes": str(num_nodes),
        "--node-rank": str(rank),
        "--head": head,
        "--replicas": "3",
        "--config": "my configs/a.yaml",
        "--run.name": "mine",
        "--run.root": "/some/runs",
        "--optim.lr": "0.1",
        "--optim": "{name: SGD, lr: 1}",
        "grace": "77",
        "cwd": str(REPOSITORY),
    }


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / name).read_text())


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path / "calls")


def test_ssh_starts_each_host(calls: Calls, tmp_path: Path) -> None:
    own = bare_environment(**calls.environment(os.environ["PATH"]), **GIVEN, HOSTS="me@first second third")
    program(calls.folder / "ssh", _SSH.format(hosts=tmp_path / "hosts"))
    run("launch/ssh.sh", own=own)
    assert calls.read() == [expected(rank, 3, "first:29500") for rank in range(3)]
    assert set((tmp_path / "hosts").read_text().split()) == {"me@first", "second", "third"}


def test_burn_in_replaces_the_run(calls: Calls, tmp_path: Path) -> None:
    own = bare_environment(**calls.environment(os.environ["PATH"]), **GIVEN, HOSTS="first second", BURN_IN="8h")
    program(calls.folder / "ssh", _SSH.format(hosts=tmp_path / "hosts"))
    run("launch/ssh.sh", own=own)
    asked = {"command": "burn-in", "--for": "8h"}
    assert calls.read() == [expected(rank, 2, "first:29500") | asked for rank in range(2)]


@pytest.mark.parametrize("code", [0, 3, 4])
def test_pbs_starts_each_node_and_returns_the_code(tmp_path: Path, code: int) -> None:
    calls = Calls(tmp_path / "calls", code)
    (tmp_path / "nodes").write_text("first\nfirst\nsecond\n")
    pbs = {"PBS_O_WORKDIR": str(REPOSITORY), "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "1234.server"}
    own = bare_environment(**calls.environment(os.environ["PATH"]), **GIVEN, **pbs, PBS_JOBNAME="job")
    program(calls.folder / "pbsdsh", _PBSDSH)
    program(calls.folder / "qsub", f"#!/bin/sh\ntouch {tmp_path}/again\n")
    run("bash", "launch/pbs.sh", own=own, code=code)
    assert calls.read() == [expected(rank, 2, "first:21234") for rank in range(2)]
    assert not (tmp_path / "again").exists()  # since the script's timer did not stop it


def test_pbs_resubmits_a_job_that_its_timer_stopped(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("first\n")
    pbs = {"PBS_O_WORKDIR": str(REPOSITORY), "PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "7.server"}
    stoppable = "#!/usr/bin/env bash\ntrap 'exit 4' TERM\nwhile :; do sleep 0.1; done\n"
    program(tmp_path / "dreplica", stoppable)
    program(tmp_path / "pbsdsh", _PBSDSH)
    program(tmp_path / "qsub", f'#!/bin/sh\necho "$@" "$RUN_NAME" "$HEAD" >{tmp_path}/again\n')
    program(tmp_path / "qstat", f"#!/bin/sh\ncat <<'END'\n{_QSTAT}END\n")
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "/"}
    own = bare_environment(**path, **pbs, PBS_JOBNAME="job", STOP_SECONDS="5", WALLTIME_SECONDS="67")
    run("bash", "launch/pbs.sh", own=own, code=4)
    asked = "-l place=scatter -l select=4:ncpus=32:ngpus=8:mpiprocs=1 -l walltime=02:00:00"
    assert (tmp_path / "again").read_text() == f"-V -N job -q big {asked} launch/pbs.sh job-7 \n"  # HEAD is not the old


def test_skypilot_task_starts_each_node(calls: Calls) -> None:
    task = load("skypilot.yaml")
    assert set(task) == {"name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run"}
    assert set(task["envs"]) == NAMES
    assert task["envs"]["RUN_ROOT"] in task["file_mounts"]
    # https://github.com/skypilot-org/skypilot/blob/master/sky/utils/schemas.py: get_task_schema, job_recovery
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": 0, "recover_on_exit_codes": [4]}
    assert task["resources"]["job_recovery"] == recovery
    assert {mount["mode"] for mount in task["file_mounts"].values()} == {"MOUNT_CACHED"}
    assert (REPOSITORY / task["envs"]["CONFIG"]).exists()
    run("bash", "-n", "-c", task["setup"], own=bare_environment())
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    base = bare_environment(**calls.environment(os.environ["PATH"]))
    for rank in range(task["num_nodes"]):
        run("bash", "-c", task["run"], own=base | GIVEN | sky | {"SKYPILOT_NODE_RANK": str(rank)})
    assert calls.read() == [expected(rank, 2, "10.0.0.1:29500") for rank in range(2)]
    given = {name: str(value) for name, value in task["envs"].items()}
    sky |= {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_TASK_ID": "sky-1"}
    run("bash", "-c", task["run"], own=base | given | sky)
    assert calls.read()[2]["--run.name"] == "sky-1"
    assert calls.read()[2]["--checkpoint.every_steps"] == "100"


def test_jobset_starts_each_pod(calls: Calls) -> None:
    jobset = load("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environ = {item["name"]: item for item in container["env"]}
    assert set(environ) == NAMES | {"NODES", "NODE_RANK", "HEAD"}
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert str(job["completions"]) == str(job["parallelism"]) == environ["NODES"]["value"]
    rank = environ["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # JobSet names pods <jobset>-<replicated job>-<job>-<pod>, within the subdomain.
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    (port,) = container["ports"]
    assert environ["HEAD"]["value"] == f"{first}:{port['containerPort']}"
    # A pod failure policy requires pods that are never restarted. With a limit of 0, JobSet handles any other failure.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob"
    assert pod_rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    # https://github.com/kubernetes-sigs/jobset/blob/main/api/jobset/v1alpha2/jobset_types.go: fields, and a rule's name
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(jobset["spec"]["network"]) == {"enableDNSHostnames", "subdomain"}
    assert set(jobset["spec"]["failurePolicy"]) == {"maxRestarts", "rules"}
    assert set(replicated) == {"name", "replicas", "template"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert set(rule) == {"name", "action", "onJobFailureReasons"}
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["terminationGracePeriodSeconds"] > int(environ["STOP_SECONDS"]["value"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["runs"] == environ["RUN_ROOT"]["value"]
    assert all(isinstance(item.get("value", ""), str) for item in environ.values())  # Kubernetes accepts only strings
    own = bare_environment(**calls.environment(os.environ["PATH"])) | GIVEN
    for index in range(job["completions"]):
        run(*container["command"], own=own | {"NODES": "2", "HEAD": environ["HEAD"]["value"], "NODE_RANK": str(index)})
    assert calls.read() == [expected(index, 2, environ["HEAD"]["value"]) for index in range(2)]


def test_jobset_matches_the_dockerfile() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    instructions = dict(line.split(maxsplit=1) for line in lines if line[:1].isupper())
    pod = load("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["workingDir"] == instructions["WORKDIR"]
    assert f"{pod['securityContext']['fsGroup']}" == instructions["USER"].partition(":")[2]


@pytest.mark.parametrize("name", ["slurm.sbatch", "pbs.sh", "ssh.sh", "node.sh"])
def test_script_reads_all_variables(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert [word for word in sorted(NAMES) if f"{word}:-" not in text and f"{word}:=" not in text] == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    scripts = [path for path in LAUNCH.iterdir() if path.suffix != ".yaml"]
    assert len(scripts) == 5
    run("shellcheck", *map(str, scripts), own=bare_environment())


@pytest.mark.cluster
def test_ssh_stops_on_a_signal_and_resumes(tmp_path: Path) -> None:
    program(tmp_path / "ssh", _SSH.format(hosts=tmp_path / "hosts"))
    endless = " ".join(f"'{setting}'" for setting in SMALL if not setting.startswith("--train.epochs"))
    own = bare_environment(
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        VIRTUAL_ENV="/",
        HOSTS="first second",
        HEAD=f"127.0.0.1:{free_ports(1)[0]}",
        RUN_NAME="job",
        RUN_ROOT=str(tmp_path),
        SETTINGS=f"{endless} --train.epochs 100000",
    )
    trace = tmp_path / "job" / "trace.jsonl"
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(["launch/ssh.sh"], cwd=REPOSITORY, env=own, stdout=log, stderr=log)
    try:
        wait_for("running", lambda: trace.exists() and len(trace.read_text().splitlines()) > 8, 60)
        script.send_signal(signal.SIGTERM)
        assert script.wait(30) == 4, (tmp_path / "log").read_text()
    finally:
        script.terminate()
        script.wait(40)
    num_steps = json.loads((tmp_path / "job" / "report.json").read_text())["run"]["stopped_after"]
    newest = list_checkpoints(tmp_path / "job" / "checkpoints")[0]
    assert newest.name == f"step_{num_steps:06d}"
    resumed = run_job(
        *SMALL[:3], SMALL[4], f"--train.max_steps={num_steps + 3}", "--train.epochs=100000", root=tmp_path
    )
    assert resumed.report["run"]["resumed_from"] == num_steps, resumed.output
