"""A Slurm cluster of two nodes on this machine, with its own munge, folder and ports."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import REPOSITORY, environment

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONFIG = """
ClusterName=dreplica
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=20
NodeName=one NodeHostname=localhost NodeAddr=127.0.0.1 Port={one} CPUs=4
NodeName=two NodeHostname=localhost NodeAddr=127.0.0.1 Port={two} CPUs=4
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""
_BAD = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> str | None:
    """Return why Slurm cannot run here, or None if it can."""
    absent = [program for program in NEEDED if shutil.which(program, path=_path()) is None]
    return f"Slurm is not installed (no {', '.join(absent)}): apt-get install slurm-wlm munge" if absent else None


def free_ports(number: int) -> list[int]:
    """Return ports that are not in use."""
    sockets = [socket.socket() for _ in range(number)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def wait_for(what: str, reached: Callable[[], bool], timeout: float, evidence: Callable[[], str] = str) -> None:
    """Wait until `reached()` is true.

    Args:
        what: Name of the awaited state, for the message.
        reached: The condition.
        timeout: Longest wait in seconds.
        evidence: Returns further text for the message.
    """
    end = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < end, f"{what}: not within {timeout} s\n{evidence()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    environment: dict[str, str]

    def submit(self, name: str, *options: str, settings: str, **more: str) -> "SlurmJob":
        """Submit launch/slurm.sbatch for two nodes with one replica each, as the run `job`.

        Args:
            name: Name of the folder for the run.
            *options: Options of sbatch.
            settings: Further command-line arguments of the run.
            **more: Environment variables.
        """
        folder = self.folder / name
        folder.mkdir()
        own = {
            "RUN_ROOT": str(folder),
            "RUN_NAME": "job",
            "SETTINGS": settings,
            "HEAD": f"127.0.0.1:{free_ports(1)[0]}",  # the nodes' names do not resolve
            "STOP_SECONDS": "15",
        }
        log = f"--output={folder}/log"
        output = self.call("sbatch", "--parsable", log, *options, "launch/slurm.sbatch", **(own | more))
        return SlurmJob(self, int(output), folder)

    def call(self, *command: str, **more: str) -> str:
        """Run one of Slurm's commands and return its output."""
        process = subprocess.run(
            command,
            env=self.environment | more,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert process.returncode == 0, f"{command}: {process.stderr}"
        return process.stdout


@dataclass(frozen=True)
class SlurmJob:
    """A submitted job."""

    cluster: Cluster
    number: int
    root: Path

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.root / "job"

    @property
    def log(self) -> str:
        """Output of the job so far."""
        path = self.root / "log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> dict[str, str]:
        """State of the job, as `scontrol show job` prints it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster.call("scontrol", "show", "job", str(self.number))))

    @property
    def num_lines(self) -> int:
        """Number of lines in the trace."""
        path = self.folder / "trace.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_until(self, what: str, reached: Callable[["SlurmJob"], bool], timeout: float = 100.0) -> None:
        """Wait until `reached(self)` is true, and fail if the job fails before."""

        def reached_or_failed() -> bool:
            failed = self.state["JobState"] in _BAD  # read first, since the state may change in between
            done = reached(self)
            assert done or not failed, f"{what}: {self.state}\n{self.log}"
            return done

        wait_for(what, reached_or_failed, timeout, lambda: f"{self.state}\n{self.log}")

    def start_now(self) -> None:
        """Wait until the job is requeued, and start it without the minutes that Slurm waits."""
        self.wait_until("requeued", lambda job: job.state["Restarts"] == "1" and job.state["JobState"] == "PENDING")
        self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait(self) -> dict[str, str]:
        """Wait until the job has ended and return its state."""
        self.wait_until("ended", lambda job: job.state["JobState"] in ("COMPLETED", *_BAD))
        return self.state


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster, and stop all its processes at the end."""
    for name in ("munge", "state", "one", "two"):
        (folder / name).mkdir(mode=0o700)
    controller, one, two = free_ports(3)
    config = _CONFIG.format(user=getpass.getuser(), folder=folder, controller=controller, one=one, two=two)
    (folder / "slurm.conf").write_text(config)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    own = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "VIRTUAL_ENV": sys.prefix}
    result = Cluster(folder, own)
    files = [f"--{kind}={folder}/munge/{kind}" for kind in ("socket", "pid-file", "seed-file", "log-file")]
    daemons = [_start(folder, own, "munged", "--foreground", "--force", f"--key-file={key}", *files)]
    try:
        wait_for("munge", (folder / "munge" / "socket").exists, 10)
        daemons.append(_start(folder, own, "slurmctld", "-D", "-i"))
        daemons += [_start(folder, own, "slurmd", "-D", "-N", node) for node in ("one", "two")]

        def idle() -> bool:
            states = subprocess.run(
                ["sinfo", "-h", "-o", "%D %t"], env=own, capture_output=True, text=True, check=False
            )
            return states.stdout == "2 idle\n"

        wait_for("two idle nodes", idle, 30, lambda: "".join(path.read_text() for path in folder.glob("*.log")))
        yield result
        result.call("scancel", "--user", getpass.getuser())
        # slurmstepd, which outlives slurmd, ends the processes of a job.
        wait_for("no job", lambda: result.call("squeue", "-h") == "", 40)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


def _start(folder: Path, own: dict[str, str], *command: str) -> "subprocess.Popen[bytes]":
    with (folder / f"{'-'.join(command[:1] + command[3:4])[:20].replace('/', '_')}.log").open("wb") as log:
        return subprocess.Popen(command, env=own, stdout=log, stderr=log)


def _path() -> str:
    """Return a PATH with this Python first, and with the folders of administrators."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
