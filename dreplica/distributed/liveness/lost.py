"""Lost ranks: which, why, after which step and where in their code."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.stack import innermost
from dreplica.distributed.rank_names import name_ranks
from dreplica.errors import DreplicaError, ExitCode

LossCode = Literal[
    "no-response", "raised", "unusable", "hung", "ended", "finished", "absent", "store-no-response", "store-lost"
]
"""Reasons for which a replica counts as lost.

no-response: its process ended without a report, or does not respond.
raised: it raised an exception.
unusable: its config, data, arguments or environment are unusable.
hung: its process responds, but the other replicas wait for it.
ended: its process ended while the other replicas waited for it.
finished: it closed its `Agreement` while the other replicas waited for it.
absent: it did not create its `Agreement` while the other replicas waited for it.
store-no-response: it serves the rendezvous store, and the store does not respond.
store-lost: it served the rendezvous store, and the connection to the store broke.
"""

T = TypeVar("T")

_MAX_LISTED = 8


@dataclass(frozen=True)
class Lost:
    """A replica that ended, failed or hangs, and why."""

    replica_id: int
    """Global rank of the lost replica."""
    code: LossCode = "no-response"
    """Reason of the loss, for programs."""
    step: int | None = None
    """Last step that the replica is known to have completed."""
    failure: Failure | None = None
    """Exception that the replica reported, with the codes `raised` and `unusable`."""
    detail: str = ""
    """First line of the store's error, with the code `store-lost`."""
    stack: tuple[str, ...] = ()
    """Innermost Python frames of a replica that hangs, the innermost last."""
    silent: float | None = None
    """Seconds for which the replica has sent no heartbeat at least, if its connection did not break."""

    @property
    def reason(self) -> str:
        """Reason of the loss, for people."""
        match self.code:
            case "raised":
                return f"raised {self.failure}"
            case "unusable":
                return "" if self.failure is None else self.failure.message
            case "hung":
                where = f" at {innermost(self.stack)}" if self.stack else ""
                return f"hangs {self._when}{where}: its process responds, but the other replicas wait for it"
            case "ended":
                return f"ended {self._when}, while the other replicas wait for it"
            case "finished":
                return f"finished {self._when}, while the other replicas wait for it"
            case "absent":
                return "did not create its Agreement, while the other replicas wait for it"
            case "store-no-response":
                seconds = "" if self.silent is None else f" for {self.silent:.0f} s"
                return f"no response{seconds} from the rendezvous store, which this replica serves"
            case "store-lost":
                return f"the rendezvous store, which this replica served, is gone ({self.detail})"
            case _ if self.silent is not None:
                return f"no heartbeat for {self.silent:.0f} s: the process is stopped or its host is unreachable"
            case _:
                return "no response: the process was killed or its host is down"

    @property
    def _when(self) -> str:
        return "before the first step" if self.step is None else f"after step {self.step}"

    @property
    def raised(self) -> bool:
        """True if the replica raised an exception, which `failure` has."""
        return self.code == "raised"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the reason as a dictionary of JSON values."""
        return asdict(self) | {"stack": list(self.stack), "reason": self.reason}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Lost":
        """Return the replica that `as_dict` was called on."""
        failure = data["failure"] and Failure.from_dict(data["failure"])
        names = ("replica_id", "code", "step", "detail", "silent")
        return cls(**{name: data[name] for name in names}, failure=failure, stack=tuple(data["stack"]))


@dataclass(frozen=True)
class Losses:
    """Result of a liveness check, the same on all replicas that survive."""

    lost: tuple[Lost, ...] = ()
    """The lost replicas."""
    finished: Mapping[int, int] = field(default_factory=dict)
    """Replicas that wait in `Agreement.finish`, with the number of steps that they took."""

    def describe(self) -> str:
        """Return one line for all replicas with the same reason, and the stacks of those that hang."""
        lines = [
            f"{name_ranks(ranks, 'replica')} finished after {steps} steps and waits in finish()"
            for steps, ranks in _grouped((steps, replica_id) for replica_id, steps in self.finished.items())
        ]
        reasons = _grouped((_detailed(item), item.replica_id) for item in self.lost)
        lines += [f"{name_ranks(ranks, 'replica')}: {reason}" for reason, ranks in reasons]
        for stack, ranks in _grouped((item.stack, item.replica_id) for item in self.lost if item.stack):
            lines += [f"stack of {name_ranks(ranks, 'replica')}, innermost last:", *(f"  {frame}" for frame in stack)]
        return "\n".join(lines)

    def error(self, replica_id: int, step: int | None, noticed: str, code: str, **fields: Any) -> "ReplicaLost":
        """Return the error that names the lost replicas.

        Args:
            replica_id: The replica that raises it.
            step: The last step that this replica has taken.
            noticed: How it noticed the loss, for people.
            code: The same, for programs.
            **fields: Further data.
        """
        where = "" if step is None else f" at step {step}"
        lines = [self.describe()] if self.lost else []
        lines.append(f"noticed by replica {replica_id}{where}: {noticed}")
        fields |= {"noticed": noticed, "finished": dict(self.finished)}
        return ReplicaLost("\n".join(lines), code=code, lost=self.lost, **fields)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary of JSON values."""
        finished = {str(replica_id): steps for replica_id, steps in self.finished.items()}
        return {"lost": [item.as_dict() for item in self.lost], "finished": finished}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Losses":
        """Return the result that `as_dict` was called on."""
        finished = {int(replica_id): steps for replica_id, steps in data["finished"].items()}
        return cls(tuple(Lost.from_dict(row) for row in data["lost"]), finished)


def _detailed(item: Lost) -> str:
    if item.step is None or item.code in {"hung", "ended", "finished"}:
        return item.reason
    return f"{item.reason} (after step {item.step})"


def _grouped(pairs: Iterable[tuple[T, int]]) -> list[tuple[T, list[int]]]:
    """Return the first few distinct values, each with the ranks that have it."""
    groups: dict[T, list[int]] = {}
    for value, rank in pairs:
        groups.setdefault(value, []).append(rank)
    return list(groups.items())[:_MAX_LISTED]


class ReplicaLost(DreplicaError, RuntimeError):
    """A collective failed since some replica ended, failed or does not respond.

    `code` is `alarm` (another replica reported a failure), `connection-lost` or `timeout`. The fields `ranks` and
    `reasons` (rank to `LossCode`) are there once the lost replicas are known. The field `noticed` is how this replica
    learned of the loss.

    Args:
        text: The message for people.
        code: Stable identifier for programs.
        lost: The lost replicas, where they are known already.
        **fields: The data that the text is made from.

    Attributes:
        lost: The lost replicas, or an empty tuple while they are unknown.
    """

    __module__ = "dreplica"  # the name under which it is imported, also in tracebacks
    default_code = "replica-lost"

    def __init__(self, text: str = "", *, code: str | None = None, lost: Sequence[Lost] = (), **fields: Any) -> None:
        super().__init__(text, code=code, **fields)
        self.lost: tuple[Lost, ...] = ()
        self.set_lost(lost)

    def set_lost(self, lost: Sequence[Lost]) -> None:
        """Add the lost replicas, once they are known."""
        self.lost = tuple(lost)
        self.fields["ranks"] = [item.replica_id for item in lost]
        self.fields["reasons"] = {item.replica_id: item.code for item in lost}


def is_reporter(lost: Sequence[Lost], replica_id: int, num_replicas: int) -> bool:
    """Return True on the one replica that reports the loss.

    Args:
        lost: The lost replicas.
        replica_id: Global rank of this process.
        num_replicas: Number of replicas, the lost ones included.

    Returns:
        True on the survivor with the lowest rank, or on rank 0 where no replica survives.
    """
    gone = {item.replica_id for item in lost}
    return replica_id == min((i for i in range(num_replicas) if i not in gone), default=0)


def exit_code_of(lost: Sequence[Lost]) -> ExitCode:
    """Return the exit code of the survivors.

    It is `UNUSABLE` if unusable input ended all lost replicas.
    """
    return ExitCode.UNUSABLE if lost and all(item.code == "unusable" for item in lost) else ExitCode.FAILED
