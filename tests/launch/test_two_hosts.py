"""Two hosts: two network namespaces with a link between them that can be taken down."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures import SMALL
from tests.harness import REPOSITORY, environment, run_job
from tests.launch.cluster import wait_for

TIMEOUT = 5.0
"""world.timeout of a run under test, in seconds."""
_MARGIN = 30.0


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)


def missing() -> str | None:
    """Return why network namespaces are not available, or None if they are."""
    if shutil.which("ip") is None:
        return "no `ip`: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"dreplica-{os.getpid()}"
    made = ip("netns", "add", probe)
    ip("netns", "delete", probe)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else None


pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.xdist_group("hosts"),
    pytest.mark.cluster,
]


@dataclass(frozen=True)
class Host:
    """One end of the link, with its own disk: the folder that its processes run in."""

    rank: int
    namespace: str
    device: str
    folder: Path

    @property
    def address(self) -> str:
        return f"10.213.77.{self.rank + 1}"

    def unplug(self) -> None:
        """Take the link down."""
        assert ip("-n", self.namespace, "link", "set", self.device, "down").returncode == 0

    @contextmanager
    def torchrun(
        self, head: "Host", *arguments: str, program: Sequence[str] = (str(REPOSITORY / "train.py"),)
    ) -> "Iterator[subprocess.Popen[str]]":
        """Start the replica of this host."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        place = [f"--node-rank={self.rank}", f"--master-addr={head.address}", "--master-port=29500"]
        command = ["ip", "netns", "exec", self.namespace, *launcher, *place, *program, *arguments]
        own = environment() | {"GLOO_SOCKET_IFNAME": self.device}
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=own, stdout=log, stderr=log, text=True)
        try:
            yield process
        finally:
            # The launcher terminates its workers, which it could not do after SIGKILL.
            process.terminate()
            process.wait(40)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    number = os.getpid()
    ends = [
        Host(rank, f"dreplica-{number}-{rank}", f"dr{number % 10**8}v{rank}", tmp_path / str(rank)) for rank in (0, 1)
    ]
    one, other = ends
    try:
        for host in ends:
            host.folder.mkdir()
            assert ip("netns", "add", host.namespace).returncode == 0
        end = ["type", "veth", "peer", "name", other.device, "netns", other.namespace]
        made = ip("link", "add", one.device, "netns", one.namespace, *end)
        assert made.returncode == 0, made.stderr
        for host in ends:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.device, "up")
        yield one, other
    finally:
        for host in ends:
            ip("netns", "delete", host.namespace)


def test_two_hosts_agree(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    with one.torchrun(one, *SMALL, "--run.name=job") as first, other.torchrun(one, *SMALL, "--run.name=job") as second:
        assert (first.wait(60), second.wait(60)) == (0, 0), one.log + other.log
    report = json.loads((one.folder / "runs/job/report.json").read_text())
    assert report["verdict"]["summary"] == "2 replicas, 10 steps: bit-identical"
    assert (one.folder / "runs/job/trace.jsonl").read_text().splitlines() == run_job(*SMALL).trace
    assert not (other.folder / "runs").exists()


def test_lost_link_ends_the_run_on_both_hosts(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    endless = [setting for setting in SMALL if not setting.startswith("--train.epochs")]
    run = [*endless, "--train.epochs=100000", f"--world.timeout={TIMEOUT}", "--run.name=job"]
    trace = one.folder / "runs/job/trace.jsonl"

    def running() -> bool:
        return trace.exists() and len(trace.read_text().splitlines()) > 8

    with one.torchrun(one, *run) as first, other.torchrun(one, *run) as second:
        wait_for("running", running, 60, lambda: one.log + other.log)
        other.unplug()
        cut = time.monotonic()
        assert first.wait(TIMEOUT + _MARGIN) != 0
        assert second.wait(max(cut + TIMEOUT + _MARGIN - time.monotonic(), 0.1)) != 0
    verdict = json.loads((one.folder / "runs/job/report.json").read_text())["verdict"]
    assert (verdict["cause"], verdict["suspects"]) == ("replica-lost", [1])
    assert "VERDICT replica-lost: replica 1 was lost in step" in one.log
    assert "VERDICT replica-lost: replica 0 was lost in step" in other.log
    assert "report.json could not be written" in other.log  # the run folder is on rank 0's disk


def test_lost_link_ends_the_burn_in_on_both_hosts(hosts: tuple[Host, Host]) -> None:
    one, other = hosts
    program = ("-m", "dreplica.commands.burn_in", "--for=8h")
    run = [*SMALL, f"--world.timeout={TIMEOUT}", "--run.name=job"]
    passes = one.folder / "runs/burn-in-job/burn_in.jsonl"

    def running() -> bool:
        return passes.exists() and len(passes.read_text().splitlines()) > 3

    with one.torchrun(one, *run, program=program) as first, other.torchrun(one, *run, program=program) as second:
        wait_for("running", running, 60, lambda: one.log + other.log)
        other.unplug()
        cut = time.monotonic()
        assert first.wait(TIMEOUT + _MARGIN) != 0
        assert second.wait(max(cut + TIMEOUT + _MARGIN - time.monotonic(), 0.1)) != 0
    for host, lost in ((one, 1), (other, 0)):
        found = json.loads((host.folder / "runs/burn-in-job/burn_in.json").read_text())
        assert found["burn_in"]["ended"] == "lost"
        assert [card["state"] for card in found["cards"]] == (["clean", "lost"] if lost else ["lost", "clean"])
        assert found["passes"] > 3
        assert f"LOST replica {lost}: " in host.log
        assert "BURN-IN found=0 suspects=none" in host.log
