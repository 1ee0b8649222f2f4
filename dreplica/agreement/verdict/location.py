"""The location of a divergence, and the verdict as far as the comparison alone supports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.signs import observe_signs, settings_differ
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.state.fingerprint.stage import STAGES, Stage

_CAUSE_OF_STAGE = {"indices": "indices-differ", "batch": "batch-differs", "predictions": "evaluation-differs"}
_MOST_RECORDED = 100
"""Entries kept in the data of a line of evidence."""
_MOST_NAMED = 5
"""Entries named in a line of evidence; the count covers all of them."""


@dataclass(frozen=True)
class Place:
    """The first place where replicas differ, with the groups they form there."""

    step: int
    """The step that was compared; the earliest where replicas are at different steps."""
    stage: str | None
    """The first stage that differs, in causal order. None if replicas are at different steps."""
    tensor: str | None
    """The stage's first entry that differs or that some replica lacks. None if there is none: replicas then have the
    same entries in different orders, or one of them has the stage without entries and another lacks it."""
    groups: list[list[int]]
    """Replica ids grouped by equal digests of the stage, the largest group first."""
    num_differing: int
    """Number of the stage's entries that differ or that some replica lacks."""
    num_entries: int
    """Number of different entry names that the replicas have in the stage."""
    differing_stages: list[str]
    """All stages that differ, in causal order."""
    only_on: dict[str, list[int]]
    """Entries of the stage that only some replicas have, with the ids of those replicas."""
    phase: str | None = None
    """`evaluation` where an evaluation was compared, otherwise None."""
    stage_groups: dict[str, list[list[int]]] = field(default_factory=dict)
    """Groups of every compared stage, in causal order."""
    differing: list[str] = field(default_factory=list)
    """The stage's entries that differ or that some replica lacks, in causal order."""
    generators: list[str] = field(default_factory=list)
    """Random number generators that differ, as named in the stage `rng`."""
    first_moved: tuple[int, list[str]] | None = None
    """Where replicas have the same entries in different orders: the first position, from 0, that holds different
    entries, and its entry on each replica."""
    signs: dict[str, list[str]] = field(default_factory=dict, compare=False)
    """What the difference shows, with the entries that show it: see `Sign`."""
    moments: list[str] = field(default_factory=list)
    """For each group, what it compared, in words, where replicas are at different steps."""

    @property
    def is_structural(self) -> bool:
        """True if replicas have different entries, rather than different values."""
        return self.tensor is None or bool(self.only_on)

    @property
    def is_order(self) -> bool:
        """True if replicas have the same entries with the same values, in different orders."""
        return self.first_moved is not None

    @property
    def when(self) -> str:
        """The step, in words."""
        if self.phase is not None:
            return f"in the {self.phase} after step {self.step}"
        return "at the build (step 0)" if self.step == 0 else f"at step {self.step}"

    @property
    def where(self) -> str:
        """Stage and tensor, in words."""
        return ", ".join(part for part in (self.stage, self.tensor) if part) or "the number of steps taken"


def first_difference(
    steps: Sequence[int], stages: Sequence[Mapping[str, Stage]], phases: Sequence[str | None] | None = None
) -> Place:
    """Locate the first difference between replicas that are known to differ.

    Args:
        steps: The step that each replica compared, by replica id.
        stages: The stages that each replica compared, by replica id.
        phases: `evaluation` for a replica that compared one. By default, none did.

    Returns:
        The first differing stage and entry, with the groups of replicas.
    """
    step = min(steps)
    moments = list(zip(steps, phases or [None] * len(steps), strict=True))
    if len(set(moments)) > 1:
        groups = split_into_groups([repr(each).encode() for each in moments])
        return Place(step, None, None, groups, 0, 0, [], {}, moments=[_moment(*moments[ids[0]]) for ids in groups])
    digests = {name: [row[name].digest if name in row else b"" for row in stages] for name in STAGES}
    differing_stages = [name for name in STAGES if len(set(digests[name])) > 1]
    assert differing_stages, "the combined digests differ, so some stage does"
    stage = differing_stages[0]
    rows, everything, differing = _entries(stages, stage)
    owners = {name: [replica for replica, row in enumerate(rows) if name in row] for name in differing}
    return Place(
        step=step,
        stage=stage,
        tensor=differing[0] if differing else None,
        groups=split_into_groups(digests[stage]),
        num_differing=len(differing),
        num_entries=len(everything),
        differing_stages=differing_stages,
        only_on={name: replicas for name, replicas in owners.items() if len(replicas) < len(rows)},
        phase=moments[0][1],
        stage_groups={name: split_into_groups(digests[name]) for name in STAGES if any(digests[name])},
        differing=differing,
        generators=_entries(stages, "rng")[2],
        first_moved=None if differing else _first_moved(rows),
        signs=observe_signs(step, stages, stage, differing),
    )


def _first_moved(rows: Sequence[Mapping[str, bytes]]) -> tuple[int, list[str]] | None:
    """Return the first position at which replicas with the same entries have different ones, and those entries."""
    for position, names in enumerate(zip(*rows, strict=True)):
        if len(set(names)) > 1:
            return position, list(names)
    return None


def _moment(step: int, phase: str | None) -> str:
    return f"step {step}" if phase is None else f"the {phase} after step {step}"


def _entries(stages: Sequence[Mapping[str, Stage]], stage: str) -> tuple[list[dict[str, bytes]], list[str], list[str]]:
    """Return the entries of a stage by replica, all their names, and the names of those that differ."""
    rows = [row[stage].entries() if stage in row else {} for row in stages]
    everything = list(dict.fromkeys(name for row in rows for name in row))
    return rows, everything, [name for name in everything if len({row.get(name) for row in rows}) > 1]


def describe(place: Place, epoch: int | None, num_replicas: int) -> Verdict:
    """Return the verdict as far as the comparison alone supports it, without remedies.

    Args:
        place: The first difference.
        epoch: The epoch of the step, if known.
        num_replicas: Number of replicas compared.

    Returns:
        Place, groups and suspects. The cause is named only where the stage alone determines it.
    """
    suspects = suspects_of(place.groups)
    evidence = _evidence(place)
    if not suspects:
        evidence.append(Evidence.of("no-majority", num_replicas=num_replicas))
    cause = _CAUSE_OF_STAGE.get(place.stage or "", "unexplained")
    if settings_differ(place.signs, place.tensor):
        cause = "hyperparameter-differs"
    return Verdict(
        agreed=False,
        cause="order-differs" if place.is_order else "structure-differs" if place.is_structural else cause,
        summary=f"replicas diverged {place.when}: {place.where}; groups {place.groups}",
        step=place.step,
        epoch=epoch,
        stage=place.stage,
        tensor=place.tensor,
        module=module_of(place.stage, place.tensor),
        phase=place.phase,
        suspects=suspects,
        groups=place.groups,
        evidence=evidence,
        stage_groups=place.stage_groups,
        signs=place.signs,
    )


def describe_algorithms(step: int, algorithms: Sequence[str]) -> Verdict:
    """Return the verdict on replicas whose fingerprints come from different algorithms.

    Args:
        step: The step that was to be compared.
        algorithms: The name of each replica's algorithm.
    """
    groups = split_into_groups([algorithm.encode() for algorithm in algorithms])
    return Verdict(
        agreed=False,
        cause="environment-differs",
        summary=f"replicas use different fingerprint algorithms, so their state cannot be compared; groups {groups}",
        step=step,
        suspects=suspects_of(groups),
        groups=groups,
        evidence=[Evidence.of("fingerprint-algorithm", replicas=ids, algorithm=algorithms[ids[0]]) for ids in groups],
        remedy=[Remedy.of("install-same-versions")],
    )


def count_differing_entries(place: Place) -> Evidence:
    """Return the evidence that counts the differing entries of the first differing stage."""
    if place.first_moved is not None:
        position, names = place.first_moved
        groups = [
            [replica for replica, name in enumerate(names) if name == each] for each in dict.fromkeys(names) if each
        ]
        some = [f"{names[ids[0]]} on replicas {ids}" for ids in groups]
        facts = {"num_entries": place.num_entries, "stage": place.stage, "position": position, "names": names}
        return Evidence.of("entry-order-differs", some="; ".join(some), **facts)
    if place.tensor is None:
        return Evidence.of("stage-missing", stage=place.stage)
    return Evidence.of(
        "entries-differ",
        num_differing=place.num_differing,
        num_entries=place.num_entries,
        stage=place.stage,
        tensor=place.tensor,
        some=list_names(place.differing),
        entries=place.differing[:_MOST_RECORDED],
    )


def _evidence(place: Place) -> list[Evidence]:
    if place.stage is None:
        compared = [f"{moment} on replicas {ids}" for moment, ids in zip(place.moments, place.groups, strict=True)]
        return [Evidence.of("steps-differ", some="; ".join(compared), moments=place.moments)]
    evidence = [count_differing_entries(place), Evidence.of("differing-stages", stages=place.differing_stages)]
    if place.generators and place.stage not in ("rng", None) and place.step > 0:
        evidence.append(Evidence.of("generators-differ-too", generators=place.generators))
    if place.only_on:
        named = [f"{name} only on replicas {ids}" for name, ids in list(place.only_on.items())[:_MOST_NAMED]]
        count, some = len(place.only_on), "; ".join(named)
        evidence.append(Evidence.of("entries-missing", count=count, some=some, entries=place.only_on))
    return evidence


def module_of(stage: str | None, tensor: str | None) -> str | None:
    """Return the path of the module that a parameter or buffer belongs to, or None for any other entry."""
    if tensor is None or stage not in {"weights", "gradients", "buffers"} or "." not in tensor:
        return None
    return tensor.rpartition(".")[0]
