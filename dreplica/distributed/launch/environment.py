"""The launch that this process belongs to, as its environment variables describe it.

torchrun sets RANK and WORLD_SIZE. srun, mpirun and other launchers set other variables, which torch does not
read: without a check, each of their processes would train alone and find nothing to disagree with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dreplica.config.messages import config_error, invalid_value
from dreplica.distributed.launch.launcher_variables import (
    LAUNCHERS,
    check_rank,
    place_within_node,
    read_integer,
    size_variable_of,
)
from dreplica.errors import UsageError

MAX_PORT = 65535


@dataclass(frozen=True)
class Launch:
    """The processes that were started together, and which of them this is."""

    launcher: str
    """The command that started them: `torchrun`, `srun`, `mpirun`, or `environment` where only RANK and WORLD_SIZE are
    known. Empty for a process that was started alone."""
    rank: int = 0
    """Global rank of this process."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank of this process within its node."""
    local_size: int = 1
    """Number of processes on this node. At least `local_rank` + 1 where the launcher does not say."""
    host: str | None = None
    """Address of rank 0 for the rendezvous, or None if it is not given."""
    port: int | None = None
    """Port of rank 0 for the rendezvous, or None if it is not given."""
    rank_variable: str = "RANK"
    """Variable that `rank` was read from."""
    size_variable: str = "WORLD_SIZE"
    """Variable that `size` was read from."""

    @property
    def is_alone(self) -> bool:
        """True if no other process was started with this one."""
        return self.size == 1

    @property
    def origin(self) -> str:
        """What was started, and how that is known, such as `srun started 2 processes (SLURM_STEP_NUM_TASKS=2)`."""
        if self.rank_variable == "RANK":
            return f"WORLD_SIZE is {self.size}"
        return f"{self.launcher} started {self.size} processes ({self.size_variable}={self.size})"

    def variables(self) -> dict[str, str]:
        """Return the variables that torchrun would have set for this process."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
        }

    def require_address(self) -> tuple[str, int]:
        """Return the host and port of rank 0 for the rendezvous.

        Raises:
            UsageError: They are not given (`no-rendezvous-address`).
        """
        if self.host is not None and self.port is not None:
            return self.host, self.port
        given = {"MASTER_ADDR": self.host, "MASTER_PORT": self.port}
        missing = [name for name, value in given.items() if value is None]
        are = "are" if len(missing) > 1 else "is"
        text = (
            f"{self.origin}, but {' and '.join(missing)} {are} not set, so the processes cannot find each other. Set "
            "MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port on it, such as 29500, or start with "
            f"`dreplica train --replicas {self.size}` instead."
        )
        raise UsageError(text, code="no-rendezvous-address", missing=missing, **self._fields())

    def no_process_group(self) -> UsageError:
        """Return the error for a custom loop of several processes without a process group."""
        fix = 'Call torch.distributed.init_process_group("gloo") first'
        if self.rank_variable != "RANK":
            fix += (
                f" (it reads RANK and WORLD_SIZE: set them from {self.rank_variable} and {self.size_variable}, and "
                "MASTER_ADDR and MASTER_PORT to a free port of rank 0's host)"
            )
            fix += f", start with torchrun, or unset {self.rank_variable} if the processes are independent."
        else:
            fix += ", or unset RANK and WORLD_SIZE for a single process."
        text = f"{self.origin} but there is no process group, so nothing would be compared. {fix}"
        return UsageError(text, code="no-process-group", **self._fields())

    def _fields(self) -> dict[str, object]:
        return {"launcher": self.launcher, "rank": self.rank, "size": self.size, "variable": self.size_variable}


def detect_launch(variables: Mapping[str, str]) -> Launch:
    """Return the launch that the environment variables describe.

    RANK and WORLD_SIZE count first. Without RANK, the variables of srun and of the MPI launchers do. Slurm sets
    SLURM_PROCID and SLURM_NTASKS in a batch script too, which it runs once, so only a step of several tasks counts.

    Args:
        variables: The environment, such as `os.environ`.

    Returns:
        The launch, with `size` 1 for a process that was started alone.

    Raises:
        UsageError: A variable is not a number, the rank is not below the size, or variables are missing or contradict
            each other.
    """
    values = {name: text.strip() for name, text in variables.items() if text.strip()}
    size = read_integer(values, "WORLD_SIZE", 1)
    started = _find_launcher(values)
    if "RANK" in values:
        launch = _from_rank(values, size, started)
    elif started is None and size is not None and size > 1:
        fix = "Set RANK to a different value from 0 on each process, start with torchrun, or unset WORLD_SIZE."
        raise _missing("RANK", f"WORLD_SIZE is {size}", fix)
    elif started is None:
        launch = _alone(values)
    elif size is not None and size != started.size:
        raise _contradiction(f"WORLD_SIZE is {size}", started, "Unset WORLD_SIZE")
    else:
        launch = started
    return launch if launch.is_alone else _with_address(launch, values)


def check_alone(variables: Mapping[str, str]) -> None:
    """Raise `UsageError` if this process is one of several that a launcher started.

    For a custom training loop without a process group, in which nothing would be compared.

    Args:
        variables: The environment, such as `os.environ`.

    Raises:
        UsageError: It is (`no-process-group`), or the variables of the launch are invalid.
    """
    launch = detect_launch(variables)
    if not launch.is_alone:
        raise launch.no_process_group()


def is_port(text: str) -> bool:
    """Return True if `text` is the number of a port that can be connected to."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_PORT)) and 0 < int(text) <= MAX_PORT


def _from_rank(values: Mapping[str, str], size: int | None, started: Launch | None) -> Launch:
    """Return the launch that RANK and WORLD_SIZE describe."""
    rank = read_integer(values, "RANK", 0)
    assert rank is not None
    if size is None:
        fix = "Set WORLD_SIZE to the number of processes, or unset RANK for a single process."
        raise _missing("WORLD_SIZE", f"RANK is {rank}", fix)
    check_rank("RANK", rank, "WORLD_SIZE", size)
    is_torchrun = "TORCHELASTIC_RUN_ID" in values or "TORCHELASTIC_USE_AGENT_STORE" in values
    if size == 1 and started is not None and not is_torchrun:
        # Exported in a shell or a job script once, and inherited by each process that srun or mpirun started.
        raise _contradiction("RANK is 0 and WORLD_SIZE is 1", started, "Unset RANK and WORLD_SIZE")
    same = started if started is not None and started.size == size else None
    local_rank = read_integer(values, "LOCAL_RANK", 0)
    if local_rank is None:
        local_rank, local_size = (0, 1) if same is None else (same.local_rank, same.local_size)
    else:
        local_size = read_integer(values, "LOCAL_WORLD_SIZE", 1) or local_rank + 1
        check_rank("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)
    return Launch("torchrun" if is_torchrun else "environment", rank, size, local_rank, local_size)


def _find_launcher(values: Mapping[str, str]) -> Launch | None:
    """Return the launch of the first launcher that started several processes, or None."""
    for launcher in LAUNCHERS:
        size_variable = size_variable_of(launcher, values)
        if launcher.rank not in values or size_variable not in values:
            continue
        rank, size = read_integer(values, launcher.rank, 0), read_integer(values, size_variable, 1)
        assert rank is not None
        assert size is not None
        check_rank(launcher.rank, rank, size_variable, size)
        if size > 1:
            local_rank, local_size = place_within_node(launcher, values, rank, size)
            return Launch(
                launcher.command,
                rank,
                size,
                local_rank,
                local_size,
                rank_variable=launcher.rank,
                size_variable=size_variable,
            )
    is_described = any(launcher.size in values for launcher in LAUNCHERS)
    return _from_pmix(values) if "PMIX_RANK" in values and "RANK" not in values and not is_described else None


def _from_pmix(values: Mapping[str, str]) -> Launch:
    """Return the launch of a process that only PMIx describes, which does not say how many there are."""
    rank, size = read_integer(values, "PMIX_RANK", 0), read_integer(values, "WORLD_SIZE", 1)
    assert rank is not None
    if size is None:
        fix = "Set WORLD_SIZE to the number of processes, or unset PMIX_RANK for a single process."
        raise _missing("WORLD_SIZE", f"PMIX_RANK is {rank}", fix)
    check_rank("PMIX_RANK", rank, "WORLD_SIZE", size)
    return Launch("prun", rank, size, rank, size, rank_variable="PMIX_RANK")


def _alone(values: Mapping[str, str]) -> Launch:
    """Return the launch of a process that was started alone."""
    local_rank = read_integer(values, "LOCAL_RANK", 0)
    if local_rank:
        fix = "Set RANK and WORLD_SIZE too, or unset LOCAL_RANK for a single process."
        raise _missing("RANK", f"LOCAL_RANK is {local_rank}", fix)
    return Launch("")


def _with_address(launch: Launch, values: Mapping[str, str]) -> Launch:
    port = values.get("MASTER_PORT")
    if port is not None and not is_port(port):
        fix = "Set it to a free port on the host of rank 0, such as 29500."
        raise invalid_value("MASTER_PORT", port, f"a port from 1 to {MAX_PORT}", fix)
    return replace(launch, host=values.get("MASTER_ADDR"), port=None if port is None else int(port))


def _missing(name: str, given: str, fix: str) -> UsageError:
    return config_error("incomplete-launch", name, f"not set, but {given}", fix)


def _contradiction(given: str, started: Launch, fix: str) -> UsageError:
    text = f"{given}, but {started.origin}. {fix}, or set them for each process."
    return UsageError(
        text, code="contradictory-launch", launcher=started.launcher, size=started.size, variable=started.size_variable
    )
