"""The launch that environment variables describe: torchrun, srun, mpirun, or none."""

import pytest

from dreplica.distributed.launch.environment import Launch, check_alone, detect_launch, is_port
from dreplica.errors import UsageError

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
JSRUN = {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
}
"""A batch script of `sbatch --ntasks=4`, which Slurm runs once."""
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
INTERACTIVE = BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
"""A shell of salloc with LaunchParameters=use_interactive_step."""
SRUN = BATCH_SCRIPT | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def place(launch: Launch) -> tuple[str, int, int, int, int]:
    return launch.launcher, launch.rank, launch.size, launch.local_rank, launch.local_size


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, ("torchrun", 1, 2, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS, ("environment", 1, 2, 0, 1)),  # Kubernetes: one process per pod
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("environment", 3, 4, 1, 2)),
        (OPEN_MPI, ("mpirun", 3, 4, 1, 2)),
        (MPICH, ("mpiexec", 3, 4, 1, 2)),
        (MVAPICH, ("mpirun", 3, 4, 1, 2)),
        (JSRUN, ("jsrun", 3, 4, 1, 2)),
        (SRUN, ("srun", 3, 4, 1, 2)),
        (SRUN | {"PMIX_RANK": "3"}, ("srun", 3, 4, 1, 2)),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, ("mpiexec", 3, 4, 1, 2)),  # srun --mpi=pmi2
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, ("mpiexec", 3, 4, 3, 4)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"}, ("mpiexec", 3, 4, 1, 2)),
        ({"PMIX_RANK": "1", "WORLD_SIZE": "2"}, ("prun", 1, 2, 1, 2)),
        ({"WORLD_SIZE": "4"} | SRUN | ADDRESS, ("srun", 3, 4, 1, 2)),  # exported in the job script
        ({"RANK": "3", "WORLD_SIZE": "4"} | OPEN_MPI, ("environment", 3, 4, 1, 2)),  # set by a wrapper
        (TORCHRUN | SRUN, ("torchrun", 1, 2, 1, 2)),  # srun --ntasks-per-node=1 torchrun
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}, ("srun", 3, 4, 1, 3)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "?"}, ("srun", 3, 4, 1, 2)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, ("srun", 1, 2, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, ("srun", 0, 2, 0, 2)),
        # mpirun starts its daemons with srun, one per node
        (OPEN_MPI | SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ("mpirun", 3, 4, 1, 2)),
    ],
)
def test_detect_launch_reads_each_launcher(variables: dict[str, str], expected: tuple[str, int, int, int, int]) -> None:
    launch = detect_launch(variables)
    assert place(launch) == expected
    assert not launch.is_alone
    with pytest.raises(UsageError) as caught:
        check_alone(variables)
    assert caught.value.code == "no-process-group"
    assert f"={launch.size})" in str(caught.value) or f"WORLD_SIZE is {launch.size} " in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH_SCRIPT,
        SALLOC,
        INTERACTIVE,
        BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "many"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        ADDRESS,
        # srun -n 2 torchrun --standalone: two independent runs
        SRUN | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"SLURM_GTIDS": "0,1", "SLURM_NTASKS": "2"},
    ],
)
def test_detect_launch_finds_a_single_process(variables: dict[str, str]) -> None:
    launch = detect_launch(variables)
    assert launch.is_alone
    assert (launch.rank, launch.local_rank, launch.local_size) == (0, 0, 1)
    check_alone(variables)


@pytest.mark.parametrize(
    ("variables", "code", "text"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "invalid-value",
            "RANK: expected a value below WORLD_SIZE, which is 2, got 2.",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "invalid-value", "RANK: expected an integer of at least 0, got '-1'."),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "invalid-value", "RANK: expected an integer of at least 0, got 'one'."),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "invalid-value", "RANK: expected an integer of at least 0, got '²'."),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "invalid-value", "WORLD_SIZE: expected an integer of at least 1, got '0'."),
        (
            {"RANK": "0", "WORLD_SIZE": "2.0"},
            "invalid-value",
            "WORLD_SIZE: expected an integer of at least 1, got '2.0'",
        ),
        ({"WORLD_SIZE": "two"}, "invalid-value", "WORLD_SIZE: expected an integer of at least 1, got 'two'."),
        ({"WORLD_SIZE": "9" * 5000}, "invalid-value", "WORLD_SIZE: expected an integer of at least 1, got '999"),
        ({"RANK": "1"}, "incomplete-launch", "WORLD_SIZE: not set, but RANK is 1. Set WORLD_SIZE to"),
        ({"RANK": "0"}, "incomplete-launch", "WORLD_SIZE: not set, but RANK is 0. Set WORLD_SIZE to"),
        ({"WORLD_SIZE": "2"}, "incomplete-launch", "RANK: not set, but WORLD_SIZE is 2. Set RANK to a different value"),
        ({"WORLD_SIZE": "4"} | BATCH_SCRIPT, "incomplete-launch", "RANK: not set, but WORLD_SIZE is 4."),
        ({"LOCAL_RANK": "1"}, "incomplete-launch", "RANK: not set, but LOCAL_RANK is 1."),
        ({"PMIX_RANK": "0"}, "incomplete-launch", "WORLD_SIZE: not set, but PMIX_RANK is 0."),
        ({"PMI_RANK": "4", "PMI_SIZE": "4"}, "invalid-value", "PMI_RANK: expected a value below PMI_SIZE, which is 4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "invalid-value", "LOCAL_RANK: expected a value below LOCAL_WORLD_SIZE"),
        (
            TORCHRUN | {"MASTER_PORT": "99999"},
            "invalid-value",
            "MASTER_PORT: expected a port from 1 to 65535, got '99999'.",
        ),
        (
            TORCHRUN | {"MASTER_PORT": "http"},
            "invalid-value",
            "MASTER_PORT: expected a port from 1 to 65535, got 'http'.",
        ),
        # exported in a shell or a job script, and inherited by each process
        (
            {"RANK": "0", "WORLD_SIZE": "1"} | OPEN_MPI,
            "contradictory-launch",
            "RANK is 0 and WORLD_SIZE is 1, but mpirun",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"} | SRUN, "contradictory-launch", "RANK is 0 and WORLD_SIZE is 1, but srun"),
        ({"WORLD_SIZE": "8"} | SRUN, "contradictory-launch", "WORLD_SIZE is 8, but srun started 4 processes"),
        ({"WORLD_SIZE": "1"} | OPEN_MPI, "contradictory-launch", "WORLD_SIZE is 1, but mpirun started 4 processes"),
    ],
)
def test_detect_launch_refuses_what_cannot_be(variables: dict[str, str], code: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        detect_launch(variables)
    assert caught.value.code == code
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 300
    with pytest.raises(UsageError):
        check_alone(variables)


@pytest.mark.parametrize(
    ("given", "missing", "verb"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT", "are"),
        ({"MASTER_ADDR": "node0"}, "MASTER_PORT", "is"),
        ({"MASTER_PORT": "29500", "MASTER_ADDR": " "}, "MASTER_ADDR", "is"),
    ],
)
def test_require_address_names_what_is_missing(given: dict[str, str], missing: str, verb: str) -> None:
    with pytest.raises(UsageError) as caught:
        detect_launch(SRUN | given).require_address()
    assert caught.value.code == "no-rendezvous-address"
    assert str(caught.value) == (
        f"srun started 4 processes (SLURM_STEP_NUM_TASKS=4), but {missing} {verb} not set, so the processes cannot "
        "find each other. Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port on it, such as 29500, "
        "or start with `dreplica train --replicas 4` instead."
    )
    assert detect_launch(SRUN | ADDRESS).require_address() == ("node0", 29500)


def test_variables_are_those_of_torchrun() -> None:
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert detect_launch(SRUN).variables() == expected
    assert place(detect_launch(expected)) == ("environment", 3, 4, 1, 2)


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        (TORCHRUN, "WORLD_SIZE is 2 but there is no process group, so nothing would be compared. Call "),
        (OPEN_MPI, "set them from OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE"),
        (OPEN_MPI, "unset OMPI_COMM_WORLD_RANK if the processes are independent"),
        (SRUN, "srun started 4 processes (SLURM_STEP_NUM_TASKS=4) but there is no process group"),
    ],
)
def test_check_alone_says_what_to_do(variables: dict[str, str], advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_alone(variables)
    assert advice in str(caught.value)


def test_check_alone_advice_to_unset_works() -> None:
    for variables in (SRUN, OPEN_MPI, MPICH, MVAPICH, JSRUN):
        rank = detect_launch(variables).rank_variable
        check_alone({name: value for name, value in variables.items() if name != rank})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("65535", True), ("0", False), ("65536", False), ("²", False), ("-1", False), ("", False)],
)
def test_is_port(text: str, expected: bool) -> None:
    assert is_port(text) is expected
