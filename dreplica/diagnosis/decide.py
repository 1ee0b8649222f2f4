"""The decision tree: from what happened and what two replays of it gave, to the cause.

Pure: it sees what every replica has gathered, so every replica decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreplica.agreement.stages import STAGES
from dreplica.agreement.verdict import split_into_classes, suspects_of
from dreplica.diagnosis.deterministic import decide_deterministic, other_numbers, with_operator
from dreplica.diagnosis.struck import flipped_bits
from dreplica.diagnosis.witness import Decision, Witness, could_have_made, first_stage
from dreplica.world.manifest import Difference

_TORCHS_OWN = ("aten.", "prims.", "numpy", "python")


def decide(
    witnesses: Sequence[Witness], overrides: Mapping[int, Mapping[str, Any]], differences: Sequence[Difference]
) -> Decision:
    """Names the cause.

    Args:
        witnesses: one per replica.
        overrides: the config's declared differences.
        differences: manifest fields in which replicas differ.
    """
    replicas = range(len(witnesses))
    irreproducible = [r for r in replicas if _parts_from_itself(witnesses[r])]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible)
    moved = [r for r in replicas if not witnesses[r].original.items() <= witnesses[r].first.items()]
    if _every_load_is_another(witnesses):
        return _other_batches(witnesses)
    classes = split_into_classes([_word(witness.first) for witness in witnesses])
    if len(classes) == 1:
        return _transient(witnesses, moved)
    if moved:
        evidence = [f"replays differ between replicas, and those of replicas {moved} also from what happened"]
        return with_operator(
            Decision("unexplained", suspects_of(classes), evidence, classes=classes), witnesses, classes
        )
    return decide_deterministic(witnesses, classes, overrides, differences)


def _not_reproducible(witnesses: Sequence[Witness], replica_ids: list[int]) -> Decision:
    stage = first_stage([witness.original for witness in witnesses])
    varying = [r for r in replica_ids if dict(witnesses[r].first) != dict(witnesses[r].second)]
    if not varying:
        steps = sorted({witness.unreproduced for witness in witnesses if witness.unreproduced is not None})
        line = f"replicas {replica_ids} do not come to what they had at step {steps[0]}, where all had agreed, though "
        return Decision("unexplained", replica_ids, [line + "two replays agree: they depend on more than their state"])
    replica_id = varying[0]
    witness = witnesses[replica_id]
    evidence = [f"two replays from the same state differ from each other on replicas {varying}"]
    if witness.first.get("batch") != witness.second.get("batch"):
        evidence.append("the batch itself came out differently each time: loading the same samples is not reproducible")
        parted = len({row.original.get("batch") for row in witnesses}) > 1
        cause = "batch-differs" if parted else "unexplained"
        return Decision(cause, replica_ids, evidence, replica_against_itself=replica_id)
    place = witness.against_itself
    if place is None:
        evidence.append("every operator gave the same both times: the difference was made outside of operators")
        return Decision("unexplained", replica_ids, evidence, replica_against_itself=replica_id)
    if not place.same_structure:
        evidence.append(
            f"structure diverged at operator {place.index}: {place.one} in one replay, {place.other} in the other"
        )
        cause = "structure-differs"
    elif not place.same_call:
        evidence.append(other_numbers(place, "in one replay", "in the other"))
        cause = "unexplained"
    elif not place.inputs_agree:
        evidence.append(f"{place.record} was given other inputs, which no recorded operator has made")
        cause = "unexplained"
    else:
        line = f"operator {place.index}, {place.record}: same inputs, other outputs in two runs on one replica"
        evidence.append(line)
        cause = "nondeterministic-operator"
    if not could_have_made(place.record, stage):
        evidence.append(f"but replicas parted in {stage}, and agreed in all that this operator has to do with")
        cause = "unexplained"
    return Decision(cause, replica_ids, evidence, place, replica_against_itself=replica_id)


def _transient(witnesses: Sequence[Witness], moved: list[int]) -> Decision:
    evidence = ["all replays agree, with each other and across replicas: the difference does not come back"]
    stage = first_stage([witness.original for witness in witnesses])
    if _drawn_in_workers(witnesses, moved):
        evidence.append("the samples are drawn at random by the process that loads them, and workers loaded them")
        classes = split_into_classes([witness.original["batch"] for witness in witnesses])
        return Decision("batch-differs", suspects_of(classes) or moved, evidence, classes=classes)
    if not moved or 2 * len(moved) >= max(len(witnesses), 3):
        evidence.append(f"the originals of replicas {moved} differ from the replays: too many for one fault")
        return Decision("unexplained", moved, evidence)
    evidence.append(f"what happened on replicas {moved} differs from its own replays; the others' does not")
    everyone = [r for r in range(len(witnesses)) if r not in moved]
    found = Decision("transient-fault", moved, evidence, classes=[everyone, *([r] for r in moved)])
    doubts = [*_other_draws(witnesses, moved, stage), *_foreign_operators(witnesses, stage)]
    return replace(found, cause="unexplained", evidence=[*evidence, *doubts]) if doubts else found


def _other_draws(witnesses: Sequence[Witness], moved: Sequence[int], stage: str | None) -> list[str]:
    """A generator that stands elsewhere, rather than one with a few bits flipped, was drawn from otherwise."""
    if stage != "rng":
        return []
    return [
        f"replica {r}'s generators were drawn from otherwise that time: torch's does not differ in single bits"
        for r in moved
        if witnesses[r].original_generator and not flipped_bits(witnesses[r].original_generator, witnesses[r].generator)
    ]


def _foreign_operators(witnesses: Sequence[Witness], stage: str | None) -> list[str]:
    names = sorted(
        {
            record.name
            for witness in witnesses
            for record in witness.records
            if not record.name.startswith(_TORCHS_OWN) and could_have_made(record, stage)
        }
    )
    if not names:
        return []
    return [f"{', '.join(names)} ran in this step, and is not torch's: whether it is deterministic is not known"]


def _every_load_is_another(witnesses: Sequence[Witness]) -> bool:
    """Whether batches parted, and no replica's came out in its replay as it had been."""
    batches = [witness.original.get("batch") for witness in witnesses]
    again = [witness.first.get("batch") for witness in witnesses]
    return len(set(batches)) > 1 and all(one != other for one, other in zip(batches, again, strict=True))


def _other_batches(witnesses: Sequence[Witness]) -> Decision:
    line = "on every replica the batch came out otherwise than before: loading it is not reproducible"
    classes = split_into_classes([witness.original["batch"] for witness in witnesses])
    return Decision("batch-differs", suspects_of(classes), [line], classes=classes)


def _drawn_in_workers(witnesses: Sequence[Witness], moved: Sequence[int]) -> bool:
    """Whether the batch parted first, on a replica whose workers drew it from generators that a replay has not."""
    if not moved or len({witness.original.get("batch") for witness in witnesses}) == 1:
        return False
    return any(witnesses[r].loaded_by_workers and witnesses[r].samples_are_random for r in moved)


def _parts_from_itself(witness: Witness) -> bool:
    return witness.unreproduced is not None or dict(witness.first) != dict(witness.second)


def _word(stages: Mapping[str, bytes]) -> bytes:
    return b"".join(stages[name] for name in STAGES if name in stages)
