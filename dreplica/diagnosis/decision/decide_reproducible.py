"""Findings on a divergence that every replay reproduces: override, environment, structure, memory or hardware.

All functions are pure, as in `decide`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import suspects_of
from dreplica.diagnosis.decision.overrides import CHANGES_CODE, divides_as, overridden, settings_behind
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import find_corruption
from dreplica.diagnosis.evidence.observation import (
    Decision,
    OpDifference,
    Witness,
    could_have_made,
    difference_behind,
    first_difference,
    with_findings,
    with_lines,
)
from dreplica.diagnosis.evidence.place import findings_at
from dreplica.diagnosis.evidence.place_kernels import kernels_at
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.environment.manifest import Difference


def find_reproducible(
    witnesses: Sequence[Witness],
    groups: list[list[int]],
    stage: str | None,
    overrides: Mapping[int, Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Decision:
    """Collect the findings on a divergence between groups of replicas, each of which reproduces its own result.

    Args:
        witnesses: The observations of each replica, by replica id.
        groups: The replicas grouped by equal digests of `stage`.
        stage: The first stage that differs.
        overrides: The config's declared differences.
        differences: Manifest fields in which the replicas differ.

    Returns:
        The findings with suspects, evidence and, where one is found, the operator.
    """
    reproduce = Finding(Kind.REPLAYS_REPRODUCE, [Evidence.of("replays-reproduce")])
    found = with_findings(Decision("unexplained", suspects_of(groups), [], groups=groups), reproduce)
    positions = _differing_samples(witnesses) if stage == "batch" else []
    if positions:
        line = Evidence.of("samples-differ", count=len(positions), positions=positions)
        return with_findings(found, Finding(Kind.SAMPLES_DIFFER, [line]), positions=positions)
    found = find_corruption(with_operator(found, witnesses, groups, stage), witnesses, stage)
    found = _find_override(found, witnesses, groups, stage, overrides)
    if Kind.MEMORY_CHANGED in found.kinds:
        return found if _others_agree(found.suspects, groups) else _several(found)
    place = found.operator
    if divides_as([repr(witness.layout) for witness in witnesses], groups):
        found = with_findings(found, Finding(Kind.LAYOUT_DIVIDES, [Evidence.of("layout-differs")]))
    if place is None:
        return found
    if not place.same_structure:
        found = with_findings(found, Finding(Kind.OTHER_OPERATORS))
        return found if _all_differ_in_structure(witnesses, groups, stage) else _several(found)
    return _find_operator(found, place, groups, stage, overrides, differences) if place.made_here else found


def _find_override(
    found: Decision,
    witnesses: Sequence[Witness],
    groups: list[list[int]],
    stage: str | None,
    overrides: Mapping[int, Mapping[str, Any]],
) -> Decision:
    """Find declared settings that divide the replicas as their results do."""
    settings = settings_behind(overrides, witnesses, found.operator, stage)
    if Kind.MEMORY_CHANGED in found.kinds:  # Only other code can do that.
        settings = {r: kept for r, row in settings.items() if (kept := {k: row[k] for k in row.keys() & CHANGES_CODE})}
    if not divides_as([repr(settings.get(replica_id)) for replica_id in range(len(witnesses))], groups):
        return found
    declared = overridden(settings, groups) if len(groups) == 2 else found.suspects
    finding = Finding(Kind.OVERRIDE_DIVIDES, [Evidence.of("settings-match-groups")])
    return with_findings(found, finding, suspects=declared)


def _find_operator(
    found: Decision,
    place: OpDifference,
    groups: list[list[int]],
    stage: str | None,
    overrides: Mapping[int, Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Decision:
    """Collect the findings on an operator that gives different results for the same call."""
    # A step may write to the batch that it is given, so an operator may affect that stage too.
    if not could_have_made(place.record, stage) and stage != "batch":
        return with_lines(found, Evidence.of("operator-cannot-explain-stage", stage=stage), operator=None)
    found = with_findings(found, Finding(Kind.OPERATOR_MADE_IT))
    if not place.record.name.startswith("aten."):
        line = Evidence.of("operator-foreign", operators=[place.record.name])
        return with_findings(found, Finding(Kind.FOREIGN_OPERATOR, [line]))
    rounding = [d for d in differences if d.may_round or d.field.startswith("numerics.")]
    dividing = [d for d in rounding if divides_as([repr(value) for value in d.values], groups)]
    if dividing:
        lines = [
            Evidence.of("environment-matches-groups", difference=str(d), field=d.field, values=list(d.values))
            for d in dividing
        ]
        return with_findings(found, Finding(Kind.ENVIRONMENT_DIVIDES, lines))
    if Kind.OVERRIDE_DIVIDES in found.kinds or Kind.LAYOUT_DIVIDES in found.kinds:
        return found
    if len(groups) > 2:
        return _several(found)
    code = "settings-and-environment-do-not-match" if rounding or overrides else "settings-and-environment-equal"
    return with_lines(found, Evidence.of(code))


def with_operator(
    decision: Decision, witnesses: Sequence[Witness], groups: list[list[int]], stage: str | None
) -> Decision:
    """Add the first operator at which the first two groups diverge, among those that affect a stage.

    Args:
        decision: The decision so far.
        witnesses: The observations of each replica, by replica id.
        groups: At least two groups of replicas.
        stage: The first stage that differs.

    Returns:
        The decision with one more line of evidence, and the operator if there is one.
    """
    one, other = sorted((groups[0][0], groups[1][0]))
    sides = witnesses[one].records, witnesses[other].records
    where = f"on replica {one}", f"on replica {other}"
    place, anywhere = difference_behind(*sides, stage), first_difference(*sides)
    if place is None and anywhere is None:
        return with_lines(decision, Evidence.of("operators-agree"), operator=None, sides=None)
    if place is None:
        assert anywhere is not None
        line = Evidence.of("operator-unrelated", index=anywhere.index, operator=anywhere.record, stage=stage)
        return with_lines(decision, line, operator=None, sides=None)
    if not place.same_structure:
        blamed = [side for side in (one, other) if side in decision.suspects]
        if len(blamed) == 1:
            place = replace(place, suspect=place.one if blamed == [one] else place.other)
        decision = with_lines(decision, describe_structure(place, where), operator=place, sides=(one, other))
        decision = with_findings(decision, *kernels_at(place, witnesses, groups))
        return with_findings(decision, *findings_at(place, witnesses, groups))
    if not place.same_call:
        decision = with_lines(decision, describe_scalars(place, where), operator=place, sides=None)
        return with_findings(decision, *findings_at(place, witnesses, groups))
    if not place.inputs_agree:
        draws = place.record.generator
        inputs = "a generator in another state or other inputs" if draws else "other inputs"
        line = Evidence.of("operator-inputs-differ", index=place.index, operator=place.record, inputs=inputs)
        decision = with_lines(decision, line, operator=place, sides=None)
        return with_findings(decision, *findings_at(place, witnesses, groups))
    decision = with_findings(decision, *kernels_at(place, witnesses, groups))
    line = Evidence.of("operator-outputs-differ", index=place.index, operator=place.record, one=one, other=other)
    return with_lines(decision, line, operator=place, sides=(one, other))


def describe_structure(place: OpDifference, where: tuple[str, str], with_source: bool = True) -> Evidence:
    """Return the evidence on two runs that execute different operators at one position.

    Args:
        place: The first position at which the operators differ.
        where: Where the two runs took place, in words.
        with_source: True to name the line of code that called each operator.
    """
    one, other = (_spell(record, with_source) for record in (place.one, place.other))
    return Evidence.of(
        "structure-diverges", index=place.index, one=one, other=other, where_one=where[0], where_other=where[1]
    )


def describe_scalars(place: OpDifference, where: tuple[str, str]) -> Evidence:
    """Return the evidence on an operator that was called with different Python numbers."""
    assert place.one is not None
    assert place.other is not None
    return Evidence.of(
        "operator-scalars-differ",
        index=place.index,
        operator=place.record,
        one=place.one.scalars,
        other=place.other.scalars,
        where_one=where[0],
        where_other=where[1],
    )


def _spell(record: OpRecord | None, with_source: bool) -> str:
    if record is None:
        return "no further operator"
    return f"{record} at {record.source}" if with_source and record.source else str(record)


def _all_differ_in_structure(witnesses: Sequence[Witness], groups: list[list[int]], stage: str | None) -> bool:
    """Return True if any two groups differ in structure, rather than some of them in something else."""
    pairs = combinations([witnesses[ids[0]].records for ids in groups], 2)
    places = [difference_behind(one, other, stage) for one, other in pairs]
    return all(place is not None and not place.same_structure for place in places)


def _several(decision: Decision) -> Decision:
    finding = Finding(Kind.SEVERAL_RESULTS, [Evidence.of("more-than-two-results")])
    return with_findings(decision, finding, corrupted=None)


def _others_agree(suspects: Sequence[int], groups: list[list[int]]) -> bool:
    return sum(any(r not in suspects for r in ids) for ids in groups) <= 1


def _differing_samples(witnesses: Sequence[Witness]) -> list[int]:
    """Return the positions of samples that differ when loaded alone. Without any, the batch was changed later."""
    rows = [witness.sample_digests for witness in witnesses]
    return [i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1]
