"""What a comparison finds: the place where replicas part, the classes they fall into, and the verdict."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a run concludes: the fields of `verdict` in report.json."""

    agreed: bool
    cause: str
    summary: str
    step: int | None = None
    epoch: int | None = None
    stage: str | None = None
    tensor: str | None = None
    module: str | None = None
    operator: str | None = None
    phase: str | None = None
    suspects: list[int] = field(default_factory=list)
    classes: list[list[int]] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    remedy: list[str] = field(default_factory=list)
    stage_classes: dict[str, list[list[int]]] = field(default_factory=dict)
    """Every stage compared at that step, in causal order, with its classes."""
    path: dict[str, Any] = field(default_factory=dict)
    """From the first operator that differs to the outputs, how far apart two replicas are; as `measure_path` gives."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields of `verdict`; `stage_classes` and `path` stand by themselves in the report."""
        return {name: value for name, value in asdict(self).items() if name not in {"stage_classes", "path"}}

    def with_(self, **changes: Any) -> "Verdict":
        """A copy with some fields changed."""
        return replace(self, **changes)


class Divergence(Exception):
    """Replicas do not hold the same state. `verdict` has the fields of the report's verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)  # the arguments that unpickling calls it with again
        self.verdict = verdict

    def __str__(self) -> str:
        return self.verdict.summary


def split_into_classes(digests: Sequence[bytes]) -> list[list[int]]:
    """Replicas grouped by equal digest: the largest class first, ties by lowest replica id; ids ascending."""
    groups: dict[bytes, list[int]] = {}
    for replica_id, digest in enumerate(digests):
        groups.setdefault(digest, []).append(replica_id)
    return sorted(groups.values(), key=lambda ids: (-len(ids), ids))


def suspects_of(classes: Sequence[Sequence[int]]) -> list[int]:
    """The replicas outside the majority class; nobody where no class holds more than half of the replicas."""
    total = sum(len(ids) for ids in classes)
    if not classes or 2 * len(classes[0]) <= total:
        return []
    return sorted(replica_id for ids in classes[1:] for replica_id in ids)
