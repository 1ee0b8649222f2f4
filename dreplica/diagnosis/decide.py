"""The decision tree: from what happened and what two replays of it gave, to the cause.

Pure: it sees what every replica has gathered, so every replica decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreplica.agreement.stages import STAGES
from dreplica.agreement.verdict import split_into_classes, suspects_of
from dreplica.diagnosis.struck import struck_memory
from dreplica.diagnosis.witness import Decision, OpDifference, Witness, first_difference
from dreplica.world.manifest import Difference


def decide(
    witnesses: Sequence[Witness], overrides: Mapping[int, Mapping[str, Any]], differences: Sequence[Difference]
) -> Decision:
    """Names the cause.

    Args:
        witnesses: one per replica.
        overrides: the config's declared differences.
        differences: manifest fields in which replicas differ and may.
    """
    replicas = range(len(witnesses))
    irreproducible = [r for r in replicas if _parts_from_itself(witnesses[r])]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible)
    moved = [r for r in replicas if dict(witnesses[r].original) != dict(witnesses[r].first)]
    classes = split_into_classes([_word(witness.first) for witness in witnesses])
    if len(classes) == 1:
        return _transient(witnesses, moved)
    if moved:
        evidence = [f"replays differ between replicas, and those of replicas {moved} also from what happened"]
        return _with_operator(
            Decision("unexplained", suspects_of(classes), evidence, classes=classes), witnesses, classes
        )
    return _deterministic(witnesses, classes, overrides, differences)


def _not_reproducible(witnesses: Sequence[Witness], replica_ids: list[int]) -> Decision:
    replica_id = replica_ids[0]
    witness = witnesses[replica_id]
    evidence = [f"two replays from the same state differ from each other on replicas {replica_ids}"]
    if witness.first.get("batch") != witness.second.get("batch"):
        evidence.append("the batch itself came out differently each time: loading the same samples is not reproducible")
        return Decision("batch-differs", replica_ids, evidence, replica_against_itself=replica_id)
    place = witness.against_itself
    if place is None:
        evidence.append("every operator gave the same both times: the difference was made outside of operators")
        return Decision("unexplained", replica_ids, evidence, replica_against_itself=replica_id)
    if not place.same_structure:
        evidence.append(
            f"structure diverged at operator {place.index}: {place.one} in one replay, {place.other} in the other"
        )
        return Decision("structure-differs", replica_ids, evidence, place, replica_against_itself=replica_id)
    if not place.same_call:
        evidence.append(_other_numbers(place, "in one replay", "in the other"))
        return Decision("unexplained", replica_ids, evidence, place, replica_against_itself=replica_id)
    if not place.inputs_agree:
        evidence.append(f"{place.record} was given other inputs, which no recorded operator has made")
        return Decision("unexplained", replica_ids, evidence, place, replica_against_itself=replica_id)
    evidence.append(f"operator {place.index}, {place.record}: same inputs, other outputs in two runs on one replica")
    return Decision("nondeterministic-operator", replica_ids, evidence, place, replica_against_itself=replica_id)


def _transient(witnesses: Sequence[Witness], moved: list[int]) -> Decision:
    evidence = ["all replays agree, with each other and across replicas: the difference does not come back"]
    if moved and all(witness.original.get("batch") != witness.first.get("batch") for witness in witnesses):
        evidence.append("on every replica the batch came out otherwise than before: loading it is not reproducible")
        classes = split_into_classes([witness.original["batch"] for witness in witnesses])
        return Decision("batch-differs", suspects_of(classes), evidence, classes=classes)
    if _drawn_in_workers(witnesses, moved):
        evidence.append("the samples are drawn at random by the process that loads them, and workers loaded them")
        classes = split_into_classes([witness.original["batch"] for witness in witnesses])
        return Decision("batch-differs", suspects_of(classes) or moved, evidence, classes=classes)
    if not moved or 2 * len(moved) >= max(len(witnesses), 3):
        evidence.append(f"the originals of replicas {moved} differ from the replays: too many for one fault")
        return Decision("unexplained", moved, evidence)
    evidence.append(f"what happened on replicas {moved} differs from its own replays; the others' does not")
    everyone = [r for r in range(len(witnesses)) if r not in moved]
    return Decision("transient-fault", moved, evidence, classes=[everyone, *([r] for r in moved)])


def _drawn_in_workers(witnesses: Sequence[Witness], moved: Sequence[int]) -> bool:
    """Whether the batch parted first, on a replica whose workers drew it from generators that a replay has not."""
    if not moved or len({witness.original.get("batch") for witness in witnesses}) == 1:
        return False
    return any(witnesses[r].loaded_by_workers and witnesses[r].samples_are_random for r in moved)


def _deterministic(
    witnesses: Sequence[Witness],
    classes: list[list[int]],
    overrides: Mapping[int, Mapping[str, Any]],
    differences: Sequence[Difference],
) -> Decision:
    suspects = suspects_of(classes)
    evidence = ["the replays reproduce the difference, on every replica: it is deterministic"]
    stage = _first_stage(witnesses)
    if stage == "batch":
        decision = _different_batches(witnesses, evidence, suspects, classes)
        if decision is not None:
            return decision
    found = _with_operator(Decision("unexplained", suspects, evidence, classes=classes), witnesses, classes)
    struck = struck_memory(found, witnesses, stage)
    if struck is not None:
        return struck
    settings = [repr(overrides.get(replica_id, {})) for replica_id in range(len(witnesses))]
    if _divides_as(settings, classes):
        declared = sorted(overrides) if len(classes) == 2 else suspects
        line = "replicas differ exactly as their declared settings do"
        return replace(found, cause="declared-override", suspects=declared, evidence=[*found.evidence, line])
    place = found.operator
    if place is not None and not place.same_structure:
        return replace(found, cause="structure-differs")
    if place is None or not place.made_here or not place.record.name.startswith("aten."):
        return found
    environment = [d for d in differences if d.may_round and _divides_as([repr(v) for v in d.values], classes)]
    if environment:
        lines = [f"replicas that differ in their result differ in {difference}" for difference in environment]
        return replace(found, cause="environment-differs", evidence=[*found.evidence, *lines])
    line = "settings and environment are the same on all replicas"
    return replace(found, cause="persistent-fault", evidence=[*found.evidence, line])


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


def _with_operator(decision: Decision, witnesses: Sequence[Witness], classes: list[list[int]]) -> Decision:
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
        line = _other_numbers(place, f"on replica {one}", f"on replica {other}")
        return _extend(decision, [line], place, None)
    if not place.inputs_agree:
        line = f"operator {place.index}, {place.record}, was given other inputs, made by no recorded operator"
        return _extend(decision, [line], place, None)
    line = f"operator {place.index}, {place.record}: inputs agree on replicas {one} and {other}, outputs do not"
    return _extend(decision, [line], place, (one, other))


def _other_numbers(place: OpDifference, here: str, there: str) -> str:
    assert place.one is not None
    assert place.other is not None
    return (
        f"operator {place.index}, {place.record}, was called with other numbers, made by no operator: "
        f"({place.one.scalars}) {here}, ({place.other.scalars}) {there}"
    )


def _extend(
    decision: Decision, lines: list[str], operator: OpDifference | None, sides: tuple[int, int] | None
) -> Decision:
    return replace(decision, evidence=[*decision.evidence, *lines], operator=operator, sides=sides)


def _divides_as(values: Sequence[str], classes: list[list[int]]) -> bool:
    """Whether replicas with equal values are in one class, and not all replicas have the same value."""
    class_of = {replica_id: number for number, ids in enumerate(classes) for replica_id in ids}
    numbers: dict[str, set[int]] = {}
    for replica_id, value in enumerate(values):
        numbers.setdefault(value, set()).add(class_of[replica_id])
    return len(numbers) > 1 and all(len(found) == 1 for found in numbers.values())


def _parts_from_itself(witness: Witness) -> bool:
    return witness.unreproduced is not None or dict(witness.first) != dict(witness.second)


def _first_stage(witnesses: Sequence[Witness]) -> str | None:
    return next((stage for stage in STAGES if len({witness.first.get(stage) for witness in witnesses}) > 1), None)


def _word(stages: Mapping[str, bytes]) -> bytes:
    return b"".join(stages[name] for name in STAGES if name in stages)
