"""The decision tree: from what happened and what two replays of it gave, to the cause.

Pure: it sees what every replica has gathered, so every replica decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreplica.agreement.verdict.verdict import split_into_classes, suspects_of
from dreplica.diagnosis.decision.decide_reproducible import decide_deterministic, other_numbers, with_operator
from dreplica.diagnosis.evidence.memory_corruption import flipped_bits
from dreplica.diagnosis.evidence.observation import Decision, Witness, could_have_made, first_stage, up_to
from dreplica.environment.manifest import Difference
from dreplica.state.stages import STAGES

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
    stage = first_stage([witness.original for witness in witnesses])
    replicas = range(len(witnesses))
    # What a step before did not reproduce may show anywhere; otherwise, what comes after `stage` is another matter.
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r in replicas if _parts_from_itself(witnesses[r], last)]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible, stage, last)
    moved = _moved(witnesses, last)
    if _every_load_is_another(witnesses):
        return _other_batches(witnesses)
    if _brings_more(witnesses):
        decision = _muddle(witnesses, _moved(witnesses, None), stage)
    elif len({up_to(witness.first, last) for witness in witnesses}) == 1:
        decision = _transient(witnesses, moved, stage)
    elif moved:
        decision = _muddle(witnesses, moved, stage)
    else:
        classes = split_into_classes([witness.original.get(stage or "", b"") for witness in witnesses])
        decision = decide_deterministic(witnesses, classes, stage, overrides, differences)
    later = _later(witnesses, moved, stage)
    return replace(decision, evidence=[*decision.evidence, *later])


def decide_alone(witnesses: Sequence[Witness], recorded: Mapping[str, bytes]) -> Decision | None:
    """Names the cause of a difference from a recorded run, of which no replay can be had.

    None if it is not to be found on this side: its replays come to what it came to.

    Args:
        witnesses: one per replica; what happened is the same on all of them.
        recorded: what the other run has: stage to 16 bytes.
    """
    common = [stage for stage in STAGES if stage in recorded and stage in witnesses[0].original]
    stage = next(stage for stage in common if recorded[stage] != witnesses[0].original[stage])
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r, row in enumerate(witnesses) if _parts_from_itself(row, last)]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible, stage, last)
    moved = _moved(witnesses, stage)
    if not moved:
        return None
    names = common[: common.index(stage) + 1]
    if any(row.first.get(name) != recorded[name] for row in witnesses for name in names):
        line = f"the replays of replicas {moved} come to neither what happened nor what the reference has"
        return Decision("unexplained", [], [line])
    line = f"the replays come to what the reference has: what happened on replicas {moved} does not come back"
    if len(witnesses) > 1:
        line += ", and it was the same on all of them, which is not how one fault strikes"
        return Decision("unexplained", [], [line])
    doubts = [*_other_draws(witnesses, moved, stage), *_foreign_operators(witnesses, stage)]
    if witnesses[0].loaded_by_workers and witnesses[0].samples_are_random:
        doubts.append("the samples are drawn at random by the process that loads them, and workers loaded them")
    return Decision("unexplained" if doubts else "transient-fault", moved, [line, *doubts])


def _moved(witnesses: Sequence[Witness], last: str | None) -> list[int]:
    """The replicas that do not come to what happened, up to the stage `last`."""
    return [r for r, row in enumerate(witnesses) if up_to(row.original, last) != up_to(row.first, last)]


def _brings_more(witnesses: Sequence[Witness]) -> bool:
    """Whether replays differ between replicas in a stage in which what happened did not."""
    return any(
        len({row.original.get(stage) for row in witnesses}) == 1 < len({row.first.get(stage) for row in witnesses})
        for stage in STAGES
    )


def _muddle(witnesses: Sequence[Witness], moved: list[int], stage: str | None) -> Decision:
    """Both at once: replays differ from each other, and from what happened."""
    evidence = [f"replays differ between replicas, and those of replicas {moved} also from what happened"]
    happened = split_into_classes([witness.original.get(stage or "", b"") for witness in witnesses])
    found = Decision("unexplained", suspects_of(happened), evidence, classes=happened)
    again = split_into_classes([up_to(row.first, stage) for row in witnesses])
    return with_operator(found, witnesses, again, stage) if len(again) > 1 else found


def _later(witnesses: Sequence[Witness], moved: Sequence[int], stage: str | None) -> list[str]:
    """What else there is in the same step: differences after `stage` that do not follow from those in it."""
    lines = []
    for replica_id, witness in enumerate(witnesses):
        after = first_stage([witness.original, witness.first])
        if after is not None and replica_id not in moved:
            lines.append(
                f"later in the step, replica {replica_id}'s replays also differ from what happened, in {after} first: "
                "that is another matter"
            )
    between = first_stage([witness.first for witness in witnesses])
    if moved and between is not None and between != stage:
        lines.append(f"later in the step, replays also differ between replicas, in {between} first")
    classes = split_into_classes([up_to(witness.original, stage) for witness in witnesses])
    for after in STAGES[STAGES.index(stage) + 1 :] if stage is not None else ():
        apart = split_into_classes([up_to(witness.original, after) for witness in witnesses])
        if len(apart) > len(classes):
            lines.append(f"later in the step, in {after}, replicas fell further apart: {apart}; that is another matter")
            break
    return lines


def _not_reproducible(
    witnesses: Sequence[Witness], replica_ids: list[int], stage: str | None, last: str | None
) -> Decision:
    varying = [r for r in replica_ids if up_to(witnesses[r].first, last) != up_to(witnesses[r].second, last)]
    # Where none reproduces itself, that singles out nobody: then the vote on what happened is all there is.
    suspects = replica_ids
    if len(replica_ids) == len(witnesses):
        suspects = suspects_of(split_into_classes([up_to(witness.original, stage) for witness in witnesses]))
    if not varying:
        steps = sorted({witness.unreproduced for witness in witnesses if witness.unreproduced is not None})
        line = f"replicas {replica_ids} do not come to what they had at step {steps[0]}, where all had agreed, though "
        return Decision("unexplained", suspects, [line + "two replays agree: they depend on more than their state"])
    replica_id = varying[0]
    witness = witnesses[replica_id]
    evidence = [f"two replays from the same state differ from each other on replicas {varying}"]
    if witness.first.get("batch") != witness.second.get("batch"):
        evidence.append("the batch itself came out differently each time: loading the same samples is not reproducible")
        parted = len({row.original.get("batch") for row in witnesses}) > 1
        cause = "batch-differs" if parted else "unexplained"
        return Decision(cause, suspects, evidence, replica_against_itself=replica_id)
    place = witness.against_itself
    if place is None:
        evidence.append("every operator gave the same both times: the difference was made outside of operators")
        return Decision("unexplained", suspects, evidence, replica_against_itself=replica_id)
    cause = "unexplained"
    if not place.same_structure:
        evidence.append(
            f"structure diverged at operator {place.index}: {place.one} in one replay, {place.other} in the other"
        )
        cause = "structure-differs"
    elif not place.same_call:
        evidence.append(other_numbers(place, "in one replay", "in the other"))
    elif not place.inputs_agree:
        evidence.append(f"{place.record} was given other inputs, which no recorded operator has made")
    else:
        line = f"operator {place.index}, {place.record}: same inputs, other outputs in two runs on one replica"
        evidence.append(line)
        cause = "nondeterministic-operator"
    if stage is not None and not could_have_made(place.record, stage):
        evidence.append(f"but replicas parted in {stage}, and agreed in all that this operator has to do with")
        return Decision("unexplained", suspects, evidence, replica_against_itself=replica_id)
    # It is the operator that is to blame then, on every replica on which it was seen to vary.
    suspects = replica_ids if cause == "nondeterministic-operator" else suspects
    return Decision(cause, suspects, evidence, place, replica_against_itself=replica_id)


def _transient(witnesses: Sequence[Witness], moved: list[int], stage: str | None) -> Decision:
    evidence = ["all replays agree, with each other and across replicas: the difference does not come back"]
    if _drawn_in_workers(witnesses, moved):
        evidence.append("the samples are drawn at random by the process that loads them, and workers loaded them")
        classes = split_into_classes([witness.original["batch"] for witness in witnesses])
        return Decision("batch-differs", suspects_of(classes) or moved, evidence, classes=classes)
    anywhere = _moved(witnesses, None)
    if not moved or 2 * len(anywhere) >= max(len(witnesses), 3):
        evidence.append(f"the originals of replicas {anywhere} differ from the replays: too many for one fault")
        return Decision("unexplained", anywhere, evidence)
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


def _parts_from_itself(witness: Witness, last: str | None) -> bool:
    return witness.unreproduced is not None or up_to(witness.first, last) != up_to(witness.second, last)
