"""A difference that every replay reproduces: declared, of the environment, of memory, or of the hardware.

Pure, as `decide` is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreplica.agreement.verdict import suspects_of
from dreplica.diagnosis.struck import struck_memory
from dreplica.diagnosis.witness import Decision, OpDifference, Witness, first_difference, first_stage
from dreplica.world.manifest import Difference

_NOT_READ_BY_REPLAYS = {"world": None, "run": None, "data": "num_workers"}
"""Sections, or one key of a section, that a replay does not depend on."""


def decide_deterministic(
    witnesses: Sequence[Witness],
    classes: list[list[int]],
    overrides: Mapping[int, Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Decision:
    """Names the cause of a difference between `classes` of replicas, each of which comes to the same each time."""
    suspects = suspects_of(classes)
    evidence = ["the replays reproduce the difference, on every replica: it is deterministic"]
    stage = first_stage([witness.first for witness in witnesses])
    if stage == "batch":
        decision = _different_batches(witnesses, evidence, suspects, classes)
        if decision is not None:
            return decision
    found = with_operator(Decision("unexplained", suspects, evidence, classes=classes), witnesses, classes)
    struck = struck_memory(found, witnesses, stage)
    if struck is not None:
        return struck if _rest_agrees(struck.suspects, classes) else _several(struck)
    settings = [repr(_settings(overrides.get(replica_id, {}))) for replica_id in range(len(witnesses))]
    if _divides_as(settings, classes):
        declared = _overridden(overrides, classes) if len(classes) == 2 else suspects
        line = "replicas differ exactly as their declared settings do"
        return replace(found, cause="declared-override", suspects=declared, evidence=[*found.evidence, line])
    place = found.operator
    if place is not None and not place.same_structure:
        return replace(found, cause="structure-differs")
    if _divides_as([repr(witness.layout) for witness in witnesses], classes):
        line = "parameters, buffers or inputs lie in memory otherwise (strides, memory format), which rounds otherwise"
        return replace(found, cause="structure-differs", evidence=[*found.evidence, line])
    if place is None or not place.made_here or not place.record.name.startswith("aten."):
        return found
    rounding = [d for d in differences if d.may_round or d.field.startswith("numerics.")]
    environment = [d for d in rounding if _divides_as([repr(value) for value in d.values], classes)]
    if environment:
        lines = [f"replicas that differ in their result differ in {difference}" for difference in environment]
        return replace(found, cause="environment-differs", evidence=[*found.evidence, *lines])
    if len(classes) > 2:
        return _several(found)
    line = "settings and environment are the same on all replicas"
    if rounding or len(set(settings)) > 1:
        line = "neither a declared setting nor the environment divides replicas as their results do"
    return replace(found, cause="persistent-fault", evidence=[*found.evidence, line])


def with_operator(decision: Decision, witnesses: Sequence[Witness], classes: list[list[int]]) -> Decision:
    """Adds the first operator that parts the first two classes."""
    one, other = sorted((classes[0][0], classes[1][0]))
    place = first_difference(witnesses[one].records, witnesses[other].records)
    if place is None:
        line = "every operator gave the same on both sides: the difference was made outside of operators"
        return _extend(decision, [line], None, None)
    if not place.same_structure:
        sides = f"{place.one} on replica {one}, {place.other} on replica {other}"
        line = f"structure diverged at operator {place.index}: {sides}"
        return _extend(decision, [line], place, None)
    if not place.same_call:
        line = other_numbers(place, f"on replica {one}", f"on replica {other}")
        return _extend(decision, [line], place, None)
    if not place.inputs_agree:
        line = f"operator {place.index}, {place.record}, was given other inputs, made by no recorded operator"
        return _extend(decision, [line], place, None)
    line = f"operator {place.index}, {place.record}: inputs agree on replicas {one} and {other}, outputs do not"
    return _extend(decision, [line], place, (one, other))


def other_numbers(place: OpDifference, here: str, there: str) -> str:
    """A line of evidence on an operator that was called with other numbers."""
    assert place.one is not None
    assert place.other is not None
    return (
        f"operator {place.index}, {place.record}, was called with other numbers, made by no operator: "
        f"({place.one.scalars}) {here}, ({place.other.scalars}) {there}"
    )


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


def _settings(partial: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a replica's declared settings that a replay can depend on."""
    kept = {}
    for section, values in partial.items():
        dropped = _NOT_READ_BY_REPLAYS.get(section, "")
        if dropped is not None and isinstance(values, Mapping):
            values = {key: value for key, value in values.items() if key != dropped}
        if dropped is not None and values:
            kept[section] = values
    return kept


def _divides_as(values: Sequence[str], classes: list[list[int]]) -> bool:
    """Whether replicas with equal values are in one class, and not all replicas have the same value."""
    class_of = {replica_id: number for number, ids in enumerate(classes) for replica_id in ids}
    numbers: dict[str, set[int]] = {}
    for replica_id, value in enumerate(values):
        numbers.setdefault(value, set()).add(class_of[replica_id])
    return all(len(found) == 1 for found in numbers.values())


def _overridden(overrides: Mapping[int, Any], classes: list[list[int]]) -> list[int]:
    """The classes of which every replica declares a difference: one that agrees with an unchanged one is no suspect."""
    return sorted(r for ids in classes if all(r in overrides for r in ids) for r in ids)
