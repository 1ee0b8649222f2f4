"""The trainer under torchrun, srun, mpirun and variables that describe no launch."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.fixtures import SMALL
from tests.harness import free_port, run_workers


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
