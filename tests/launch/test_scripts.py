"""Job scripts: each runs the same command on each node, with its scheduler's variables for the node's place."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
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
NAMES = {"REPLICAS_PER_NODE", "CONFIG", "RUN_NAME", "RUN_ROOT", "SETTINGS", "DEVICE", "STOP_SECONDS"}
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
# A fake pbsdsh of OpenPBS: -n counts the lines of PBS_NODEFILE, a process inherits nothing, and the exit code is 0.
[[ "$1" == -n && "$3" == -- ]] || exit 99
host=$(sed -n "$(($2 + 1))p" "$PBS_NODEFILE")
shift 3
echo "$host" >>"$PBS_NODEFILE.used"
[[ "$host" != dead ]] || exit 0
[[ "$host" != deaf ]] || exec sleep 600
env -i PATH=/usr/bin:/bin "$@"
exit 0
"""
_QSTAT = """Job Id: 7.server
    Job_Name = job
    queue = big
    resources_used.walltime = {used}
    Resource_List.ncpus = 128
    Resource_List.place = scatter
    Resource_List.select = {select}
\t:mpiprocs=1
    Resource_List.walltime = {limit}
    Variable_List = PBS_O_HOME=/home/me,
\tPBS_O_WORKDIR=/home/me/dreplica

"""
"""Output of OpenPBS."""
_STOPPABLE = "#!/usr/bin/env bash\ntrap 'exit 4' TERM\nwhile :; do sleep 0.1; done\n"
"""A `dreplica` command that runs until it is stopped."""


@dataclass(frozen=True)
class Pbs:
    """A fake PBS that has started a job on some nodes, with a fake `dreplica` command."""

    folder: Path
    calls: Calls

    def environment(
        self, nodes: str, chunks: str = "4:ncpus=32", limit: str = "24:00:00", used: str = "00:00:00", **more: str
    ) -> dict[str, str]:
        """Return the environment of the job.

        Args:
            nodes: Lines of PBS_NODEFILE.
            chunks: Value of `-l select`.
            limit: Value of `-l walltime`.
            used: Time that the job has run for.
            **more: Further variables.
        """
        own = self.calls.environment(os.environ["PATH"])
        (self.folder / "nodes").write_text(nodes.replace(" ", "\n") + "\n")
        program(self.calls.folder / "pbsdsh", _PBSDSH)
        attributes = _QSTAT.format(select=chunks, limit=limit, used=used)
        program(self.calls.folder / "qstat", f"#!/bin/sh\ncat <<'END'\n{attributes}END\n")
        again = self.folder / "again"
        program(self.calls.folder / "qsub", f'#!/bin/sh\necho "$@" "$RUN_NAME" "$REQUEUES" "$HEAD" >{again}\n')
        pbs = {
            "PBS_O_WORKDIR": str(REPOSITORY),
            "PBS_NODEFILE": str(self.folder / "nodes"),
            "PBS_JOBID": "1234.server",
            "PBS_JOBNAME": "job",
            "RUN_ROOT": str(self.folder / "some runs"),
            "EXIT_CODE_SECONDS": "1",
        }
        return bare_environment() | own | pbs | more

    @property
    def submitted(self) -> str | None:
        """Arguments of qsub and variables of the next job, or None if there is none."""
        path = self.folder / "again"
        return path.read_text() if path.exists() else None


@pytest.fixture
def pbs(tmp_path: Path) -> Pbs:
    return Pbs(tmp_path, Calls(tmp_path / "calls"))


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def bare_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without the variables that a script reads."""
    return {
        key: value for key, value in environment().items() if key not in NAMES | {"HEAD", "NODES", "BURN_IN"}
    } | more


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


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_pbs_starts_each_node_and_returns_the_code(tmp_path: Path, code: int) -> None:
    """Although pbsdsh returns 0."""
    pbs = Pbs(tmp_path, Calls(tmp_path / "calls", code))
    given = {**GIVEN, "RUN_ROOT": str(tmp_path / "some runs")}
    run("bash", "launch/pbs.sh", own=pbs.environment("first second", **given), code=code)
    root = {"--run.root": given["RUN_ROOT"]}
    assert pbs.calls.read() == [expected(rank, 2, "first:21234") | root for rank in range(2)]
    assert pbs.submitted is None  # since the script's timer did not stop it
    assert list((tmp_path / "some runs").iterdir()) == []


@pytest.mark.parametrize("nodes", ["first first second second", "first second first second"])
def test_pbs_starts_one_launcher_for_all_mpiprocs(pbs: Pbs, nodes: str) -> None:
    run("bash", "launch/pbs.sh", own=pbs.environment(nodes))
    assert [call["--node-rank"] for call in pbs.calls.read()] == ["0", "1"]
    assert {(call["--nodes"], call["--replicas"]) for call in pbs.calls.read()} == {("2", "2")}
    used = (pbs.folder / "nodes.used").read_text().split()
    assert sorted(set(used)) == ["first", "second"]
    assert used.count("first") == used.count("second")


def test_pbs_refuses_different_numbers_of_mpiprocs(pbs: Pbs) -> None:
    printed = run("bash", "launch/pbs.sh", own=pbs.environment("first first second"), code=2)
    assert printed == "error: the nodes have different numbers of mpiprocs (1 2). Set REPLICAS_PER_NODE.\n"
    run("bash", "launch/pbs.sh", own=pbs.environment("first first second", REPLICAS_PER_NODE="1"))


@pytest.mark.parametrize("bad", ["dead", "deaf"])
def test_pbs_fails_if_a_node_leaves_no_exit_code(pbs: Pbs, bad: str) -> None:
    """pbsdsh returns 0 for a node that is down, or never returns."""
    own = pbs.environment(f"first {bad}", STOP_SECONDS="-59")
    printed = run("bash", "launch/pbs.sh", own=own, code=1)
    assert f"error: node 1 ({bad}) has left no exit code in {pbs.folder}/some runs/.exit-codes-" in printed
    assert "it is down, or its processes were killed." in printed


def stoppable(pbs: Pbs, **options: str) -> dict[str, str]:
    own = pbs.environment("first", STOP_SECONDS="5", **options)
    program(pbs.calls.folder / "dreplica", _STOPPABLE)
    return own


def test_pbs_resubmits_a_job_that_its_timer_stopped(pbs: Pbs) -> None:
    own = stoppable(pbs, chunks="4:ncpus=32:ngpus=8", limit="02:00:00", used="01:58:53")
    assert "submitted again" in run("bash", "launch/pbs.sh", own=own, code=4)
    asked = "-l place=scatter -l select=4:ncpus=32:ngpus=8:mpiprocs=1 -l walltime=02:00:00"
    assert pbs.submitted == f"-V -N job -q big {asked} launch/pbs.sh job-1234 1 \n"  # HEAD is not the old one


def test_pbs_waits_for_the_checkpoint_after_qdel(pbs: Pbs) -> None:
    """qdel signals all processes of the job, pbsdsh included, and the run has not saved yet."""
    own = stoppable(pbs)
    saving = _STOPPABLE.replace("exit 4", "sleep 2; exit 4").replace("while", f"touch {pbs.folder}/running\nwhile")
    program(pbs.calls.folder / "dreplica", saving)
    command = ["bash", "launch/pbs.sh"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=subprocess.PIPE, start_new_session=True) as script:
        wait_for("running", (pbs.folder / "running").exists, 20)
        os.killpg(script.pid, signal.SIGTERM)
        script.communicate(timeout=25)
    assert script.returncode == 4
    assert pbs.submitted is None


@pytest.mark.parametrize(("limit", "used"), [("67", "0"), ("01:07", "00:00"), ("24:01:07", "24:00:00")])
def test_pbs_reads_the_time_limit(pbs: Pbs, limit: str, used: str) -> None:
    run("bash", "launch/pbs.sh", own=stoppable(pbs, limit=limit, used=used), code=4)
    assert pbs.submitted is not None


def test_pbs_resubmits_a_limited_number_of_times(pbs: Pbs) -> None:
    own = stoppable(pbs, limit="67", REQUEUES="3", MAX_REQUEUES="3")
    printed = run("bash", "launch/pbs.sh", own=own, code=4)
    assert "stopped with a checkpoint: not submitted again, after 3 times (MAX_REQUEUES)" in printed
    assert pbs.submitted is None


def test_pbs_refuses_a_time_limit_without_time_to_train(pbs: Pbs) -> None:
    """It would be stopped before its first step, and submitted again and again."""
    printed = run("bash", "launch/pbs.sh", own=pbs.environment("first", limit="00:03:00"), code=2)
    assert printed.startswith("error: 180 s are left until the time limit, and STOP_SECONDS plus one minute are 180 s.")
    assert pbs.calls.read() == []


def test_pbs_reports_that_no_time_limit_is_known(pbs: Pbs) -> None:
    own = pbs.environment("first")
    program(pbs.calls.folder / "qstat", "#!/bin/sh\nexit 1\n")
    printed = run("bash", "launch/pbs.sh", own=own)
    assert printed.startswith(
        "no time limit is known from 'qstat -f 1234.server', so no checkpoint is written before it"
    )


@pytest.mark.parametrize(
    ("chunks", "more", "device"),
    [
        ("4:ncpus=32:ngpus=8", {}, "cuda"),
        ("4:ncpus=32:ngpus=0", {}, None),
        ("4:ncpus=32", {}, None),
        ("4:ncpus=32:ngpus=8", {"DEVICE": "auto"}, "auto"),
        ("4:ncpus=32:ngpus=8", {"SETTINGS": "--world.device cpu"}, "cpu"),
    ],
)
def test_pbs_runs_on_the_gpus_it_asked_for(pbs: Pbs, chunks: str, more: dict[str, str], device: str | None) -> None:
    run("bash", "launch/pbs.sh", own=pbs.environment("first", chunks=chunks, **more))
    (call,) = pbs.calls.read()
    assert call.get("--world.device") == device


_SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""


@dataclass(frozen=True)
class Slurm:
    """A fake Slurm that has started a job on one node."""

    folder: Path
    calls: Calls

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of the job."""
        own = self.calls.environment(os.environ["PATH"])
        program(self.calls.folder / "srun", _SRUN)
        hosts = '[ "$1" = requeue ] || echo first'
        program(self.calls.folder / "scontrol", f'#!/bin/sh\necho "$@" >>{self.folder}/scontrol\n{hosts}\n')
        # the signal before the time limit
        program(self.calls.folder / "scancel", f"#!/bin/sh\nkill -TERM $(cat {self.folder}/pid)\n")
        slurm = {
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "first",
        }
        return bare_environment() | own | slurm | more


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, Calls(tmp_path / "calls"))


@pytest.mark.parametrize(
    ("more", "device"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "cuda"),
        ({"SLURM_JOB_GPUS": "0,1"}, "cuda"),
        ({"SLURM_GPUS_PER_NODE": "a100:8", "DEVICE": "cpu"}, "cpu"),
    ],
)
def test_slurm_runs_on_the_gpus_it_asked_for(slurm: Slurm, more: dict[str, str], device: str | None) -> None:
    run("bash", "launch/slurm.sbatch", own=slurm.environment(**more))
    (call,) = slurm.calls.read()
    assert call.get("--world.device") == device


@pytest.mark.parametrize(("restarts", "again"), [("", True), ("2", True), ("3", False)])
def test_slurm_requeues_a_limited_number_of_times(slurm: Slurm, restarts: str, again: bool) -> None:
    own = slurm.environment(MAX_REQUEUES="3", SLURM_RESTART_COUNT=restarts)
    ready = f"echo $$ >{slurm.folder}/pid\n"
    program(slurm.calls.folder / "dreplica", _STOPPABLE.replace("while", f"{ready}while"))
    command = ["bash", "launch/slurm.sbatch"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=subprocess.PIPE, text=True) as script:
        wait_for("running", (slurm.folder / "pid").exists, 20)
        script.send_signal(signal.SIGUSR2)
        printed, _ = script.communicate(timeout=20)
    assert script.returncode == 4
    requeued = "requeue 12" in (slurm.folder / "scontrol").read_text()
    assert requeued is again
    text = "requeued" if again else "not requeued, after 3 restarts (MAX_REQUEUES)"
    assert printed == f"stopped with a checkpoint: {text}\n"


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        ({}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-0b1c,GPU-2d3e"}, "cuda"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),  # as images have it, with and without a GPU
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, None),
        ({"DEVICE": "cpu"}, "cpu"),
        ({"DEVICE": "cuda", "SETTINGS": "--optim.lr 1 --world.device=auto"}, None),
    ],
)
def test_node_passes_the_device(calls: Calls, variables: dict[str, str], device: str | None) -> None:
    run("bash", "launch/node.sh", own=bare_environment(**calls.environment(os.environ["PATH"])) | variables)
    arguments = calls.read_arguments()
    assert ("--world.device" in arguments) == (device is not None)
    assert device is None or arguments[arguments.index("--world.device") + 1] == device


def test_node_waits_until_the_head_is_known(calls: Calls, tmp_path: Path) -> None:
    """A pod may start before the first pod of its job, whose name is not known until then."""
    own = bare_environment(**calls.environment(os.environ["PATH"]), HEAD="first:29500", HEAD_SECONDS="20")
    known = f"#!/bin/sh\n[ -e {tmp_path}/known ] && exit 0\necho $2 >{tmp_path}/asked\ntouch {tmp_path}/known\nexit 2\n"
    program(calls.folder / "getent", known)
    run("bash", "launch/node.sh", own=own)
    assert (tmp_path / "asked").read_text() == "first\n"
    assert calls.read()[0]["--head"] == "first:29500"


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
    assert set(environ) == NAMES | {"NODES", "NODE_RANK", "HEAD", "HEAD_SECONDS"}
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
    longer = (f"--train.max_steps={num_steps + 3}", "--train.epochs=100000")
    resumed = run_job(*SMALL, *longer, root=tmp_path)
    assert resumed.report["run"]["resumed_from"] == num_steps, resumed.output
