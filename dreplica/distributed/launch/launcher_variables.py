"""The variables that launchers other than torchrun set for each of their processes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dreplica.config.messages import invalid_value


@dataclass(frozen=True)
class Launcher:
    """Names of the variables that a launcher sets."""

    command: str
    """The command, for messages."""
    rank: str
    size: str
    local_rank: tuple[str, ...]
    """Variables with the rank within the node, of which the first that is set counts."""
    local_size: tuple[str, ...] = ()
    """Variables with the number of processes on the node."""


_SLURM = Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",))
LAUNCHERS = (
    Launcher(  # Open MPI
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(  # MVAPICH2
        "mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(  # MPICH and Intel MPI (Hydra), Cray PALS, Flux, srun --mpi=pmi2
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_LOCAL_RANK",)),
    _SLURM,
)
"""Known launchers. Those that may run inside another come first: mpirun starts its daemons with srun, for example."""


def size_variable_of(launcher: Launcher, values: Mapping[str, str]) -> str:
    """Return the variable with the number of processes.

    SLURM_NTASKS is that of the job in a batch script and in a shell of salloc, where only one process runs. It is that
    of the step where there is a step, or a task other than the first.
    """
    if launcher is not _SLURM or launcher.size in values:
        return launcher.size
    in_step = "SLURM_STEP_ID" in values or values.get(launcher.rank, "0") != "0"
    return "SLURM_NTASKS" if in_step else launcher.size


def place_within_node(launcher: Launcher, values: Mapping[str, str], rank: int, size: int) -> tuple[int, int]:
    """Return the rank within the node and the number of processes on the node.

    Args:
        launcher: The launcher that started this process.
        values: The environment.
        rank: Global rank of this process.
        size: Number of processes.

    Raises:
        UsageError: A variable is not a number.
    """
    name = next((name for name in launcher.local_rank if name in values), None)
    if name is None:  # as on one node: a GPU is chosen modulo the number of GPUs
        return rank, size
    local_rank = read_integer(values, name, 0)
    assert local_rank is not None
    if name == "SLURM_LOCALID":
        return local_rank, max(local_rank + 1, _slurm_tasks_on_node(values))
    sizes = (read_integer(values, name, 1) for name in launcher.local_size if name in values)
    return local_rank, max(local_rank + 1, next(sizes, None) or 1)


def sees_only_own_gpus(values: Mapping[str, str], num_gpus: int) -> bool:
    """Return True if srun gave each task its own GPUs, and this process sees only those (`--gpus-per-task`).

    Args:
        values: The environment.
        num_gpus: Number of GPUs that this process sees.
    """
    asked = f"gpu:{values.get('SLURM_GPUS_PER_TASK', '')},{values.get('SLURM_TRES_PER_TASK', '')}"
    match = re.search(r"gpu[^,]*[:=](\d{1,6})(?:,|$)", asked)  # 1, a100:1, cpu=4,gres/gpu:1, gres/gpu:a100=1
    return match is not None and int(match[1]) == num_gpus and "TORCHELASTIC_RUN_ID" not in values


def _slurm_tasks_on_node(values: Mapping[str, str]) -> int:
    """Return the number of this step's tasks on this node, from a list such as `8(x3),4`. It is 1 if unknown."""
    counts: list[int] = []
    for item in values.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item.strip())
        if match is None:
            return 1
        counts += [int(match[1])] * int(match[2] or 1)
    node = values.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1


def read_integer(values: Mapping[str, str], name: str, minimum: int) -> int | None:
    """Return the value of a variable, or None if it is not set.

    Args:
        values: The environment.
        name: Name of the variable.
        minimum: Smallest value that is valid.

    Raises:
        UsageError: It is smaller, or not a number.
    """
    text = values.get(name)
    if text is None:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text) or int(text) < minimum:
        raise invalid_value(name, text, f"an integer of at least {minimum}", f"Correct or unset {name}.")
    return int(text)


def check_rank(rank_variable: str, rank: int, size_variable: str, size: int) -> None:
    """Raise `UsageError` unless the rank is below the number of processes.

    Args:
        rank_variable: Variable that the rank was read from.
        rank: The rank.
        size_variable: Variable that the number was read from.
        size: Number of processes.
    """
    if rank >= size:
        expected = f"a value below {size_variable}, which is {size}"
        fix = f"Number the processes from 0 to {size - 1}."
        raise invalid_value(rank_variable, rank, expected, fix)
