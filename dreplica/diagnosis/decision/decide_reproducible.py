"""A difference that every replay reproduces: declared, of the environment, of memory, or of the hardware.

Pure, as `decide` is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from dreplica.agreement.verdict.verdict import suspects_of
from dreplica.diagnosis.decision.overrides import divides_as, overridden, settings_behind
from dreplica.diagnosis.evidence.memory_corruption import struck_memory
from dreplica.diagnosis.evidence.observation import (
    Decision,
    OpDifference,
    Witness,
    could_have_made,
    difference_behind,
    first_difference,
)
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.environment.manifest import Difference


def decide_deterministic(
    witnesses: Sequence[Witness],
    classes: list[list[int]],
    stage: str | None,
    overrides: Mapping[int, Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Decision:
    """Names the cause of a difference between `classes` of replicas, each of which comes to the same each time.

    `stage`: the first in which they part.
    """
    suspects = suspects_of(classes)
    evidence = ["the replays reproduce the difference, on every replica: it is deterministic"]
    if stage == "batch":
        decision = _different_batches(witnesses, evidence, suspects, classes)
        if decision is not None:
            return decision
    found = with_operator(Decision("unexplained", suspects, evidence, classes=classes), witnesses, classes, stage)
    struck = struck_memory(found, witnesses, stage)
    if struck is not None:
        return struck if _rest_agrees(struck.suspects, classes) else _several(struck)
    place = found.operator
    settings = settings_behind(overrides, witnesses, place, stage)
    if divides_as([repr(settings.get(replica_id)) for replica_id in range(len(witnesses))], classes):
        declared = overridden(settings, classes) if len(classes) == 2 else suspects
        line = "replicas differ exactly as their declared settings do"
        return replace(found, cause="declared-override", suspects=declared, evidence=[*found.evidence, line])
    if place is not None and not place.same_structure:
        return replace(found, cause="structure-differs") if _all_part_so(witnesses, classes, stage) else _several(found)
    if divides_as([repr(witness.layout) for witness in witnesses], classes):
        line = "parameters, buffers or inputs lie in memory otherwise (strides, memory format), which rounds otherwise"
        return replace(found, cause="structure-differs", evidence=[*found.evidence, line])
    if place is None or not place.made_here or not place.record.name.startswith("aten."):
        return found
    if not could_have_made(place.record, stage) and stage != "batch":  # of which a step may write in what it is given
        line = f"but replicas parted in {stage}, which this operator has nothing to do with"
        return replace(found, evidence=[*found.evidence, line], operator=None)
    rounding = [d for d in differences if d.may_round or d.field.startswith("numerics.")]
    environment = [d for d in rounding if divides_as([repr(value) for value in d.values], classes)]
    if environment:
        lines = [f"replicas that differ in their result differ in {difference}" for difference in environment]
        return replace(found, cause="environment-differs", evidence=[*found.evidence, *lines])
    if len(classes) > 2:
        return _several(found)
    line = "settings and environment are the same on all replicas"
    if rounding or overrides:
        line = (
            "neither a declared setting that can change what this operator gives nor the environment divides replicas "
            "as their results do"
        )
    return replace(found, cause="persistent-fault", evidence=[*found.evidence, line])


def with_operator(
    decision: Decision, witnesses: Sequence[Witness], classes: list[list[int]], stage: str | None
) -> Decision:
    """Adds the first operator that parts the first two classes and has to do with `stage`."""
    one, other = sorted((classes[0][0], classes[1][0]))
    sides = witnesses[one].records, witnesses[other].records
    place, anywhere = difference_behind(*sides, stage), first_difference(*sides)
    if place is None and anywhere is None:
        line = "every operator gave the same on both sides: the difference was made outside of operators"
        return _extend(decision, [line], None, None)
    if place is None:
        assert anywhere is not None
        line = (
            f"operator {anywhere.index}, {anywhere.record}, is the first that differs, but has nothing to do with "
            f"{stage}, in which replicas parted: the difference was made outside of operators"
        )
        return _extend(decision, [line], None, None)
    if not place.same_structure:
        blamed = [side for side in (one, other) if side in decision.suspects]
        if len(blamed) == 1:
            place = replace(place, suspect=place.one if blamed == [one] else place.other)
        line = f"{_told(place.one)} on replica {one}, {_told(place.other)} on replica {other}"
        return _extend(decision, [f"structure diverged at operator {place.index}: {line}"], place, (one, other))
    if not place.same_call:
        line = other_numbers(place, f"on replica {one}", f"on replica {other}")
        return _extend(decision, [line], place, None)
    if not place.inputs_agree:
        what = (
            "a generator in another state, or other inputs," if ".generator" in place.record.name else "other inputs,"
        )
        line = f"operator {place.index}, {place.record}, was given {what} made by no recorded operator"
        return _extend(decision, [line], place, None)
    line = f"operator {place.index}, {place.record}: inputs agree on replicas {one} and {other}, outputs do not"
    return _extend(decision, [line], place, (one, other))


def _told(record: OpRecord | None) -> str:
    if record is None:
        return "nothing more"
    return f"{record} at {record.source}" if record.source else str(record)


def other_numbers(place: OpDifference, here: str, there: str) -> str:
    """A line of evidence on an operator that was called with other numbers."""
    assert place.one is not None
    assert place.other is not None
    return (
        f"operator {place.index}, {place.record}, was called with other numbers, made by no operator: "
        f"({place.one.scalars}) {here}, ({place.other.scalars}) {there}"
    )


def _all_part_so(witnesses: Sequence[Witness], classes: list[list[int]], stage: str | None) -> bool:
    """Whether any two classes part in structure, and not some in that and others in something else."""
    pairs = combinations([witnesses[ids[0]].records for ids in classes], 2)
    places = [difference_behind(one, other, stage) for one, other in pairs]
    return all(place is not None and not place.same_structure for place in places)


def _several(decision: Decision) -> Decision:
    line = "replicas came to more than two results: no one cause accounts for all of them"
    return replace(decision, cause="unexplained", struck=None, evidence=[*decision.evidence, line])


def _rest_agrees(suspects: Sequence[int], classes: list[list[int]]) -> bool:
    return sum(any(r not in suspects for r in ids) for ids in classes) <= 1


def _different_batches(
    witnesses: Sequence[Witness], evidence: list[str], suspects: list[int], classes: list[list[int]]
) -> Decision | None:
    """Samples that differ when loaded by themselves; None if they do not, so that the batch was changed afterwards."""
    rows = [witness.sample_digests for witness in witnesses]
    positions = [i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1]
    if not positions:
        return None
    evidence = [*evidence, f"{len(positions)} samples of the batch are different data on different replicas"]
    return Decision("batch-differs", suspects, evidence, classes=classes, positions=positions)


def _extend(
    decision: Decision, lines: list[str], operator: OpDifference | None, sides: tuple[int, int] | None
) -> Decision:
    return replace(decision, evidence=[*decision.evidence, *lines], operator=operator, sides=sides)
