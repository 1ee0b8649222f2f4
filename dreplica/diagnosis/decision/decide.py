"""The decision tree: from the original step and two replays of it to the cause.

All functions are pure: they see what every replica has gathered, so every replica decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import split_into_groups, suspects_of
from dreplica.diagnosis.decision.decide_reproducible import (
    decide_deterministic,
    describe_scalars,
    describe_structure,
    with_operator,
)
from dreplica.diagnosis.decision.rules import name_in
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import flipped_bits
from dreplica.diagnosis.evidence.observation import (
    Decision,
    Witness,
    could_have_made,
    first_stage,
    merge_findings,
    up_to,
    with_findings,
)
from dreplica.environment.manifest import Difference
from dreplica.state.stages import STAGES

_TORCHS_OWN = ("aten.", "prims.", "numpy", "python")
_TWO_REPLAYS = ("in one replay", "in the other")


def decide(
    witnesses: Sequence[Witness], overrides: Mapping[int, Mapping[str, Any]], differences: Sequence[Difference]
) -> Decision:
    """Name the cause of a divergence between replicas.

    Args:
        witnesses: The observations of each replica, by replica id.
        overrides: The config's declared differences.
        differences: Manifest fields in which the replicas differ.

    Returns:
        The cause with suspects, evidence and, where one is found, the operator.
    """
    stage = first_stage([witness.original for witness in witnesses])
    replicas = range(len(witnesses))
    # What an earlier step did not reproduce may show in any stage. Otherwise, stages after `stage` are a separate
    # matter.
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r in replicas if _differs_from_itself(witnesses[r], last)]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible, stage, last)
    unreproduced = _not_reproduced(witnesses, last)
    if _every_batch_differs(witnesses):
        return _other_batches(witnesses)
    if _replays_diverge_more(witnesses):
        decision = _mixed(witnesses, _not_reproduced(witnesses, None), stage)
    elif len({up_to(witness.first, last) for witness in witnesses}) == 1:
        decision = _transient(witnesses, unreproduced, stage)
    elif unreproduced:
        decision = _mixed(witnesses, unreproduced, stage)
    else:
        groups = split_into_groups([witness.original.get(stage or "", b"") for witness in witnesses])
        decision = decide_deterministic(witnesses, groups, stage, overrides, differences)
    return name_in(replace(decision, evidence=[*decision.evidence, *_later(witnesses, unreproduced, stage)]))


def decide_alone(witnesses: Sequence[Witness], recorded: Mapping[str, bytes]) -> Decision | None:
    """Name the cause of a difference from a recorded run, which cannot be replayed.

    Args:
        witnesses: The observations of each replica. The original step is the same on all of them.
        recorded: The recorded digests: stage to 16 bytes.

    Returns:
        The cause, or None if this run reproduces itself, in which case this side does not contain the cause.
    """
    common = [stage for stage in STAGES if stage in recorded and stage in witnesses[0].original]
    stage = next(stage for stage in common if recorded[stage] != witnesses[0].original[stage])
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r, row in enumerate(witnesses) if _differs_from_itself(row, last)]
    if irreproducible:
        return _not_reproducible(witnesses, irreproducible, stage, last)
    unreproduced = _not_reproduced(witnesses, stage)
    if not unreproduced:
        return None
    names = common[: common.index(stage) + 1]
    if any(row.first.get(name) != recorded[name] for row in witnesses for name in names):
        return Decision("unexplained", [], [Evidence.of("reference-neither", replicas=unreproduced)])
    evidence = [Evidence.of("reference-matches-replay", replicas=unreproduced)]
    if len(witnesses) > 1:
        return Decision("unexplained", [], [*evidence, Evidence.of("reference-on-all-replicas")])
    doubts = [*_other_draws(witnesses, unreproduced, stage), *_foreign_operators(witnesses, stage)]
    if witnesses[0].loaded_by_workers and witnesses[0].samples_are_random:
        doubts.append(Evidence.of("samples-random-in-workers"))
    findings = [Finding(Kind.REPLAYS_AGREE), Finding(Kind.ORIGINAL_DIFFERS, replicas=unreproduced)]
    found = Decision(
        "unexplained" if doubts else "transient-fault", unreproduced, [*evidence, *doubts], findings=findings
    )
    return with_findings(found, merge_findings(witnesses, unreproduced))


def _not_reproduced(witnesses: Sequence[Witness], last: str | None) -> list[int]:
    """Return the replicas whose first replay differs from the original step, up to the stage `last`."""
    return [r for r, row in enumerate(witnesses) if up_to(row.original, last) != up_to(row.first, last)]


def _replays_diverge_more(witnesses: Sequence[Witness]) -> bool:
    """Return True if replays diverge between replicas in a stage in which the originals agreed."""
    return any(
        len({row.original.get(stage) for row in witnesses}) == 1 < len({row.first.get(stage) for row in witnesses})
        for stage in STAGES
    )


def _mixed(witnesses: Sequence[Witness], unreproduced: list[int], stage: str | None) -> Decision:
    """Decide where replays differ both from each other and from the original step."""
    evidence = [Evidence.of("replays-and-originals-differ", replicas=unreproduced)]
    original = split_into_groups([witness.original.get(stage or "", b"") for witness in witnesses])
    found = Decision("unexplained", suspects_of(original), evidence, groups=original)
    again = split_into_groups([up_to(row.first, stage) for row in witnesses])
    return with_operator(found, witnesses, again, stage) if len(again) > 1 else found


def _later(witnesses: Sequence[Witness], unreproduced: Sequence[int], stage: str | None) -> list[Evidence]:
    """Return differences after `stage`, in the same step, that do not follow from those in it."""
    evidence = []
    for replica_id, witness in enumerate(witnesses):
        after = first_stage([witness.original, witness.first])
        if after is not None and replica_id not in unreproduced:
            evidence.append(Evidence.of("later-replay-differs", replica=replica_id, stage=after))
    between = first_stage([witness.first for witness in witnesses])
    if unreproduced and between is not None and between != stage:
        evidence.append(Evidence.of("later-replicas-differ", stage=between))
    groups = split_into_groups([up_to(witness.original, stage) for witness in witnesses])
    for after in STAGES[STAGES.index(stage) + 1 :] if stage is not None else ():
        split = split_into_groups([up_to(witness.original, after) for witness in witnesses])
        if len(split) > len(groups):
            evidence.append(Evidence.of("later-groups-split", stage=after, groups=split))
            break
    return evidence


def _not_reproducible(
    witnesses: Sequence[Witness], replica_ids: list[int], stage: str | None, last: str | None
) -> Decision:
    """Decide where the replays of some replicas differ from each other, or from an earlier step that agreed."""
    varying = [r for r in replica_ids if up_to(witnesses[r].first, last) != up_to(witnesses[r].second, last)]
    # Where no replica reproduces itself, that singles out none of them: only the vote on the original step is left.
    suspects = replica_ids
    if len(replica_ids) == len(witnesses):
        suspects = suspects_of(split_into_groups([up_to(witness.original, stage) for witness in witnesses]))
    if not varying:
        steps = sorted({witness.unreproduced for witness in witnesses if witness.unreproduced is not None})
        evidence = [Evidence.of("replays-miss-agreed-step", replicas=replica_ids, step=steps[0])]
        return Decision("unexplained", suspects, evidence)
    replica_id = varying[0]
    witness = witnesses[replica_id]
    evidence = [Evidence.of("replays-vary", replicas=varying)]
    if witness.first.get("batch") != witness.second.get("batch"):
        evidence.append(Evidence.of("batch-varies"))
        differs = len({row.original.get("batch") for row in witnesses}) > 1
        cause = "batch-differs" if differs else "unexplained"
        return Decision(cause, suspects, evidence, replica_against_itself=replica_id)
    place = witness.against_itself
    if place is None:
        evidence.append(Evidence.of("operators-agree-twice"))
        return Decision("unexplained", suspects, evidence, replica_against_itself=replica_id)
    cause = "unexplained"
    if not place.same_structure:
        evidence.append(describe_structure(place, _TWO_REPLAYS, with_source=False))
        cause = "structure-differs"
    elif not place.same_call:
        evidence.append(describe_scalars(place, _TWO_REPLAYS))
    elif not place.inputs_agree:
        evidence.append(
            Evidence.of("operator-inputs-differ", index=place.index, operator=place.record, inputs="other inputs")
        )
    else:
        evidence.append(Evidence.of("operator-varies", index=place.index, operator=place.record))
        cause = "nondeterministic-operator"
    if stage is not None and not could_have_made(place.record, stage):
        evidence.append(Evidence.of("operator-stage-agreed-earlier", stage=stage))
        return Decision("unexplained", suspects, evidence, replica_against_itself=replica_id)
    # The operator is to blame then, on every replica on which it was seen to vary.
    suspects = replica_ids if cause == "nondeterministic-operator" else suspects
    return Decision(cause, suspects, evidence, place, replica_against_itself=replica_id)


def _transient(witnesses: Sequence[Witness], unreproduced: list[int], stage: str | None) -> Decision:
    """Decide where all replays agree, so that the divergence is not reproduced."""
    evidence = [Evidence.of("replays-agree")]
    agree = Finding(Kind.REPLAYS_AGREE)
    if _drawn_in_workers(witnesses, unreproduced):
        evidence.append(Evidence.of("samples-random-in-workers"))
        groups = split_into_groups([witness.original["batch"] for witness in witnesses])
        findings = [agree, Finding(Kind.SAMPLES_DIFFER)]
        return Decision(
            "batch-differs", suspects_of(groups) or unreproduced, evidence, groups=groups, findings=findings
        )
    anywhere = _not_reproduced(witnesses, None)
    if not unreproduced or 2 * len(anywhere) >= max(len(witnesses), 3):
        evidence.append(Evidence.of("originals-differ-widely", replicas=anywhere))
        found = Decision("unexplained", anywhere, evidence, findings=[agree, Finding(Kind.ORIGINALS_DIFFER_WIDELY)])
        return with_findings(found, merge_findings(witnesses, anywhere))
    evidence.append(Evidence.of("original-differs", replicas=unreproduced))
    reproduced = [r for r in range(len(witnesses)) if r not in unreproduced]
    found = Decision(
        "transient-fault",
        unreproduced,
        evidence,
        groups=[reproduced, *([r] for r in unreproduced)],
        findings=[agree, Finding(Kind.ORIGINAL_DIFFERS, replicas=unreproduced)],
    )
    found = with_findings(found, merge_findings(witnesses, unreproduced))
    doubts = [*_other_draws(witnesses, unreproduced, stage), *_foreign_operators(witnesses, stage)]
    return replace(found, cause="unexplained", evidence=[*found.evidence, *doubts]) if doubts else found


def _other_draws(witnesses: Sequence[Witness], unreproduced: Sequence[int], stage: str | None) -> list[Evidence]:
    """Return evidence for each generator that was drawn from differently, rather than had a few bits flipped."""
    if stage != "rng":
        return []
    return [
        Evidence.of("generator-drawn-differently", replica=r)
        for r in unreproduced
        if witnesses[r].original_generator and not flipped_bits(witnesses[r].original_generator, witnesses[r].generator)
    ]


def _foreign_operators(witnesses: Sequence[Witness], stage: str | None) -> list[Evidence]:
    names = sorted(
        {
            record.name
            for witness in witnesses
            for record in witness.records
            if not record.name.startswith(_TORCHS_OWN) and could_have_made(record, stage)
        }
    )
    return [Evidence.of("operator-foreign", operators=names)] if names else []


def _every_batch_differs(witnesses: Sequence[Witness]) -> bool:
    """Return True if batches diverged and no replica's replay loaded its original batch."""
    batches = [witness.original.get("batch") for witness in witnesses]
    again = [witness.first.get("batch") for witness in witnesses]
    return len(set(batches)) > 1 and all(one != other for one, other in zip(batches, again, strict=True))


def _other_batches(witnesses: Sequence[Witness]) -> Decision:
    groups = split_into_groups([witness.original["batch"] for witness in witnesses])
    return Decision("batch-differs", suspects_of(groups), [Evidence.of("batch-never-reproduced")], groups=groups)


def _drawn_in_workers(witnesses: Sequence[Witness], unreproduced: Sequence[int]) -> bool:
    """Return True if a batch that differs was drawn by worker processes, whose generators a replay does not have."""
    if not unreproduced or len({witness.original.get("batch") for witness in witnesses}) == 1:
        return False
    return any(witnesses[r].loaded_by_workers and witnesses[r].samples_are_random for r in unreproduced)


def _differs_from_itself(witness: Witness, last: str | None) -> bool:
    return witness.unreproduced is not None or up_to(witness.first, last) != up_to(witness.second, last)
