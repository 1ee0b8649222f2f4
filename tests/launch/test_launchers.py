"""The trainer under torchrun, srun, mpirun and variables that describe no launch."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.fixtures import SMALL
from tests.harness import free_port, run_workers, start_workers


def srun(rank: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }


def mpirun(rank: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_RANK": str(rank),
    }


def mpiexec(rank: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}


def exported(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2"}


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


LAUNCHERS = [srun, mpirun, mpiexec, exported]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_trainer_rendezvous_at_the_given_address(launcher: Callable[[int], Mapping[str, str]], tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    job = run_workers([SMALL] * 2, tmp_path, launched=[{**launcher(rank), **address} for rank in range(2)])
    assert job.exitcodes == {}, job.output
    assert job.report["verdict"]["summary"] == "2 replicas, 10 steps: bit-identical"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_trainer_requires_an_address(launcher: Callable[[int], Mapping[str, str]], tmp_path: Path) -> None:
    job = run_workers([SMALL] * 2, tmp_path, launched=[launcher(rank) for rank in range(2)])
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    printed = errors(job.stderr)
    assert len(printed) == 2  # one for each process, since none can reach the other
    for message in printed:
        assert "MASTER_ADDR and MASTER_PORT are not set" in message
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "error: RANK: expected a value below WORLD_SIZE, which is 2, got 2."),
        ({"RANK": "1"}, "error: WORLD_SIZE: not set, but RANK is 1."),
        ({"WORLD_SIZE": "2"}, "error: RANK: not set, but WORLD_SIZE is 2."),
        ({"RANK": "0", "WORLD_SIZE": "none"}, "error: WORLD_SIZE: expected an integer of at least 1, got 'none'."),
        ({"RANK": "0", "WORLD_SIZE": "1", **srun(1)}, "error: RANK is 0 and WORLD_SIZE is 1, but srun started 2 proc"),
        (
            {**srun(0), "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
            "error: MASTER_PORT: expected a port from 1 to 65535",
        ),
    ],
)
def test_trainer_refuses_what_cannot_be(variables: dict[str, str], text: str, tmp_path: Path) -> None:
    job = run_workers([SMALL], tmp_path, launched=[variables])
    assert job.exitcodes == {0: 2}, job.output
    (message,) = errors(job.stderr)
    assert message.startswith(text)
    assert not job.folder.exists()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_trainer_records_alone(variables: dict[str, str], tmp_path: Path) -> None:
    job = run_workers([SMALL], tmp_path, launched=[variables])
    assert job.exitcodes == {}, job.output
    assert "RECORDED" in job.output


@pytest.mark.parametrize(("absent", "agent_holds_store"), [(1, False), (0, True)])
def test_absent_replica_is_named(absent: int, agent_holds_store: bool, tmp_path: Path) -> None:
    """A replica that has not started yet, or that is frozen in its imports."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent_holds_store else None
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port() if store is None else store.port)}
    if agent_holds_store:
        address["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [rank for rank in range(3) if rank != absent]
    launched = [{"RANK": str(rank), "WORLD_SIZE": "3", **address} for rank in ranks]
    began = time.monotonic()
    job = run_workers([[*SMALL, "--world.timeout=6"]] * 2, tmp_path, launched=launched)
    assert time.monotonic() - began < 6 + 15
    assert job.exitcodes == {0: 1, 1: 1}, job.output
    named = errors(job.stderr)
    assert "Traceback" not in job.stderr
    assert "[c10d]" not in job.stderr
    if absent == 1:
        assert named == [
            "error: rank 1 (of 3) did not arrive within 6 s (world.timeout). See its output. "
            "If starting takes longer, set a longer world.timeout."
        ]
        assert "waiting for rank 1 (1 of 3): 5 s of at most 6 s (world.timeout)" in job.stderr
    else:
        assert len(named) == (1 if agent_holds_store else 2)  # they cannot reach each other without rank 0
        assert all("rank 0" in line for line in named)
        assert "waiting for rank 0" in job.stderr
    assert not job.folder.exists()


@pytest.mark.parametrize("stopped", [0, 1])
def test_replica_stopped_at_the_rendezvous_is_named(stopped: int, tmp_path: Path) -> None:
    """Rank 0 is suspended while it serves the store, or another rank after it has arrived."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched = [{"RANK": str(rank), "WORLD_SIZE": "3", **address} for rank in range(3)]
    argv = [*SMALL, f"--run.root={tmp_path}", "--world.timeout=6"]
    processes, _, outputs = start_workers([argv] * 2, launched=launched)
    try:
        wait_for_text(outputs / "0.err", "waiting for rank 2")
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        others, _, more = start_workers([argv], launched=launched[2:])
        processes += others
        running = [process for index, process in enumerate(processes) if index != stopped]
        for process in running:
            process.join(40)
        assert [process.exitcode for process in running] == [1, 1]
    finally:
        for process in processes:
            process.kill()
            process.join()
    printed = "".join(path.read_text() for folder in (outputs, more) for path in folder.glob("*.err"))
    assert "Traceback" not in printed
    assert errors(printed)
    assert all(f"rank {stopped} " in line or f"replica {stopped}:" in line for line in errors(printed)), printed


def wait_for_text(path: Path, text: str) -> None:
    end = time.monotonic() + 30
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([("0", "3"), ("1", "3"), ("1", "3")], "error: two processes have rank 1: process "),
        ([("0", "2"), ("1", "4")], "error: WORLD_SIZE is 2 on rank 0 and 4 on rank 1 (process "),
    ],
)
def test_trainer_refuses_ranks_that_do_not_fit(places: list[tuple[str, str]], text: str, tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched = [{"RANK": rank, "WORLD_SIZE": size, **address} for rank, size in places]
    job = run_workers([[*SMALL, "--world.timeout=3"]] * len(places), tmp_path, launched=launched)
    named = errors(job.stderr)
    assert job.exitcodes == dict.fromkeys(range(len(places)), 2), job.output
    assert len(named) == 1
    assert named[0].startswith(text)
    assert not job.folder.exists()
