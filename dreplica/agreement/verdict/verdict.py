"""Verdicts: what a comparison or a diagnosis concludes, and the exception that carries one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.errors import DreplicaError

_MOST_EVIDENCE = 5
"""Lines of evidence in the text of a `Divergence`."""
_PLACE = ("step", "stage", "tensor", "module", "operator", "phase")


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a run, a comparison or a diagnosis."""

    agreed: bool
    """True if everything that was compared is equal."""
    cause: str
    """The code of the cause: a key of `CAUSES`, `none` where nothing is wrong."""
    summary: str
    """One line for people, which says what diverged and where, or what was compared."""
    step: int | None = None
    """The training step at which replicas diverged; 0 is the build."""
    epoch: int | None = None
    """The epoch of that step, counted from 1."""
    stage: str | None = None
    """The first stage that differs, in causal order."""
    tensor: str | None = None
    """The first entry of the stage that differs."""
    module: str | None = None
    """Path of the module that the tensor or the operator belongs to."""
    operator: str | None = None
    """The first operator that differs, as in `aten.mm.default`."""
    phase: str | None = None
    """The phase of that operator (`forward`, `backward`, `optimizer`, `build`), or `evaluation`."""
    suspects: list[int] = field(default_factory=list)
    """Ids of the replicas that are probably wrong; empty where none can be singled out."""
    groups: list[list[int]] = field(default_factory=list)
    """Replica ids grouped by equal digests, the largest group first."""
    evidence: list[Evidence] = field(default_factory=list)
    """The observations that the cause rests on."""
    remedy: list[Remedy] = field(default_factory=list)
    """The actions to take against the cause."""
    stage_groups: dict[str, list[list[int]]] = field(default_factory=dict)
    """Groups of every stage compared at that step, in causal order."""
    signs: dict[str, list[str]] = field(default_factory=dict)
    """What the comparison shows, from which remedies follow: see `dreplica.agreement.verdict.signs`."""
    shard: dict[str, int] | None = None
    """On a device mesh, the part of a split tensor: axis to coordinate."""
    mesh: dict[str, int] | None = None
    """On a device mesh, its axes with their sizes."""
    path: dict[str, Any] = field(default_factory=dict)
    """Distance of two replicas from the first operator that differs to the outputs, as `measure_path` returns it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `verdict` in report.json as JSON values.

        `stage_groups` and `path` are left out, since the report keeps them in `divergence`, and so are `signs`.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["stage_groups"], values["path"], values["signs"]
        for name in ("shard", "mesh"):
            if values[name] is None:
                del values[name]
        return values | {
            "suspects": list(self.suspects),
            "groups": [list(ids) for ids in self.groups],
            "evidence": [item.as_dict() for item in self.evidence],
            "remedy": [item.as_dict() for item in self.remedy],
        }

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {label}: {text}" for label, text in self.details())])

    def with_(self, **changes: Any) -> "Verdict":
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def details(self) -> Iterator[tuple[str, str]]:
        """Yield label and text of each line below the summary: place, groups, evidence, remedies, how to read more."""
        if self.cause == "none":
            return
        place = [f"{name} {value}" for name in _PLACE if (value := getattr(self, name)) not in (None, "")]
        if place:
            yield "where", ", ".join(place)
        if self.suspects or sum(map(len, self.groups)) > 1:  # one process alone has no suspect
            yield "who", f"suspects {self.suspects or 'none'}, groups {self.groups}"
        yield from (("evidence", str(item)) for item in self.evidence)
        yield from (("remedy", str(item)) for item in self.remedy)
        yield "explain", explain_command(self.cause, "build" if self.step == 0 and self.stage else self.stage)


def explain_command(cause: str, stage: str | None = None) -> str:
    """Return the command that prints the page of a cause or, where the cause is unknown, the stage's usual mistakes."""
    return f"dreplica explain {stage if cause == 'unexplained' and stage else cause}"


class Divergence(DreplicaError):
    """Replicas do not hold the same state.

    The text of rank 0 has the place, up to five lines of evidence, and the remedies. Those of the other ranks are one
    line, so that a terminal with the tracebacks of all ranks stays readable. `verdict` is whole on every rank.

    Args:
        verdict: What differs, and where.
        rank: The rank of this process.

    Attributes:
        verdict: What differs, where, between which replicas, with evidence and remedies.
    """

    __module__ = "dreplica"  # the name under which it is imported, also in tracebacks
    default_code = "divergence"

    def __init__(self, verdict: Verdict, rank: int = 0) -> None:
        super().__init__(verdict.summary, cause=verdict.cause)
        self.verdict = verdict
        self._rank = rank

    def __str__(self) -> str:
        if self._rank:
            return f"{self.verdict.summary}; rank 0 prints the evidence"
        lines = [f"  {label}: {text}" for label, text in shorten_evidence(self.verdict.details())]
        return "\n".join([self.verdict.summary, *lines])


def shorten_evidence(details: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lines below a verdict's summary with at most five lines of evidence, and the number of the others."""
    details = list(details)
    evidence = [line for line in details if line[0] == "evidence"]
    left_out = evidence[_MOST_EVIDENCE:]
    if not left_out:
        return details
    kept = [line for line in details if line not in left_out]
    last = kept.index(evidence[_MOST_EVIDENCE - 1])
    kept.insert(last + 1, ("evidence", f"{len(left_out)} more lines in verdict.evidence"))
    return kept


def split_into_groups(digests: Sequence[bytes]) -> list[list[int]]:
    """Group replica ids by equal digest.

    Args:
        digests: One per replica.

    Returns:
        The groups, the largest first, ties ordered by lowest id, with ids ascending.
    """
    groups: dict[bytes, list[int]] = {}
    for replica_id, digest in enumerate(digests):
        groups.setdefault(digest, []).append(replica_id)
    return sorted(groups.values(), key=lambda ids: (-len(ids), ids))


def suspects_of(groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the replicas outside the majority group, or none where no group holds more than half of them."""
    total = sum(len(ids) for ids in groups)
    if not groups or 2 * len(groups[0]) <= total:
        return []
    return sorted(replica_id for ids in groups[1:] for replica_id in ids)
