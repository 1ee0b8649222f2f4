"""The state that recent steps began with, kept so that a diagnosis replays a step from the state that it had."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dreplica.agreement.hasher import Hasher
from dreplica.agreement.subject import Subject
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.state.replica import LoopParts
from dreplica.state.snapshot import Snapshot, take_snapshot
from dreplica.state.stages import Stage
from dreplica.state.version_counters import VersionCounters


@dataclass(frozen=True)
class Original:
    """What is known of the step at which replicas diverged, on this replica."""

    subject: Subject
    """The models and optimizers that were compared."""
    found: Verdict | None
    """The verdict of the comparison; None before a divergence."""
    stages: Mapping[str, Stage]
    """Digests of the stages that were compared."""
    before: Snapshot | None
    """The state that the step began with; None if it was not kept."""
    versions: VersionCounters | None
    """Version counters of the tensors when `before` was copied; None if it was not kept."""
    is_ddp: bool
    """True if replicas are the ranks of one data-parallel model, each with its own batch."""
    hasher: Hasher
    """What computed the digests."""

    def observe(self) -> dict[str, Stage]:
        """Return the digests of the present state, as the comparison computes them."""
        entries = self.subject.after_step(None, None, None, None)
        return self.hasher.start({name: entries[name] for name in self.stages if name in entries}).stages

    def digest(self, name: str, tensor: Tensor) -> bytes:
        """Return the digest of a tensor under a name, as the comparison computes it."""
        return self.hasher.start({"": [(name, tensor)]}).stages[""].digests


class KeptStates:
    """Copies of the state before the newest steps, in memory that is allocated once.

    Args:
        subject: The models and optimizers whose state is kept.
        steps: Number of steps whose states are kept.
    """

    def __init__(self, subject: Subject, steps: int) -> None:
        self._parts = LoopParts(subject.model, subject.optimizers, subject.others)
        self._most = steps
        self._kept: deque[tuple[int, Snapshot]] = deque()
        self._versions: dict[int, VersionCounters] = {}

    def keep(self, step: int) -> None:
        """Copy the present state as the one that `step` begins with, over the oldest copy."""
        oldest: Snapshot | None = None
        if self._kept and self._kept[-1][0] == step:  # called twice before a step
            _, oldest = self._kept.pop()
        elif len(self._kept) == self._most:
            _, oldest = self._kept.popleft()
        self._kept.append((step, take_snapshot(self._parts, oldest)))
        numbers = {number for number, _ in self._kept}
        self._versions = {number: each for number, each in self._versions.items() if number in numbers}
        self._versions[step] = VersionCounters(self._parts)

    def before(self, step: int | None) -> Snapshot | None:
        """Return the state that `step` began with, or None if it was not kept."""
        return next((snapshot for number, snapshot in self._kept if number == step), None)

    def versions(self, step: int | None) -> VersionCounters | None:
        """Return the version counters of the tensors when the state before `step` was copied."""
        return None if step is None else self._versions.get(step)
