"""From the original step and two replays of it to the findings that name its cause.

All functions are pure: they see what every replica has gathered, so every replica decides the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import split_into_groups, suspects_of
from dreplica.diagnosis.decision.decide_reproducible import (
    describe_scalars,
    describe_structure,
    find_reproducible,
    with_operator,
)
from dreplica.diagnosis.decision.rules import name_in
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import (
    Decision,
    OpDifference,
    Witness,
    could_have_made,
    first_stage,
    merge_findings,
    up_to,
    with_findings,
    with_lines,
)
from dreplica.diagnosis.evidence.provenance import differing_inputs
from dreplica.diagnosis.tracing.memory_tracker import OUTSIDE
from dreplica.environment.manifest import Difference
from dreplica.state.stages import STAGES

_TORCHS_OWN = ("aten.", "prims.", "numpy", "python")
_TWO_REPLAYS = ("in one replay", "in the other")


def decide(
    witnesses: Sequence[Witness], overrides: Mapping[int, Mapping[str, Any]], differences: Sequence[Difference]
) -> Decision:
    """Collect the findings on a divergence between replicas, and name the cause as far as they suffice.

    Args:
        witnesses: The observations of each replica, by replica id.
        overrides: The config's declared differences.
        differences: Manifest fields in which the replicas differ.

    Returns:
        The findings with suspects, evidence and, where one is found, the operator. Hardware needs more of them: those
        of the tensors themselves.
    """
    stage = first_stage([witness.original for witness in witnesses])
    replicas = range(len(witnesses))
    # What an earlier step did not reproduce may show in any stage. Otherwise, stages after `stage` are a separate
    # matter.
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r in replicas if _differs_from_itself(witnesses[r], last)]
    if irreproducible:
        return name_in(_find_irreproducible(witnesses, irreproducible, stage, last))
    unreproduced = _not_reproduced(witnesses, last)
    if _every_batch_differs(witnesses):
        groups = split_into_groups([witness.original["batch"] for witness in witnesses])
        finding = Finding(Kind.SAMPLES_DIFFER, [Evidence.of("batch-never-reproduced")])
        return name_in(_start(suspects_of(groups), finding, groups=groups))
    if _replays_diverge_more(witnesses):
        decision = _find_astray(witnesses, _not_reproduced(witnesses, None), stage)
    elif len({up_to(witness.first, last) for witness in witnesses}) == 1:
        decision = _find_one_time(witnesses, unreproduced, stage)
    elif unreproduced:
        decision = _find_astray(witnesses, unreproduced, stage)
    else:
        groups = split_into_groups([witness.original.get(stage or "", b"") for witness in witnesses])
        decision = find_reproducible(witnesses, groups, stage, overrides, differences)
    return name_in(with_lines(decision, *_later(witnesses, unreproduced, stage)))


def decide_alone(witnesses: Sequence[Witness], recorded: Mapping[str, bytes]) -> Decision | None:
    """Collect the findings on a difference from a recorded run, which cannot be replayed.

    Args:
        witnesses: The observations of each replica. The original step is the same on all of them.
        recorded: The recorded digests: stage to 16 bytes.

    Returns:
        The findings, or None if this run reproduces itself, in which case this side does not contain the cause.
    """
    common = [stage for stage in STAGES if stage in recorded and stage in witnesses[0].original]
    stage = next(stage for stage in common if recorded[stage] != witnesses[0].original[stage])
    last = None if any(witness.unreproduced is not None for witness in witnesses) else stage
    irreproducible = [r for r, row in enumerate(witnesses) if _differs_from_itself(row, last)]
    if irreproducible:
        return _find_irreproducible(witnesses, irreproducible, stage, last)
    unreproduced = _not_reproduced(witnesses, stage)
    if not unreproduced:
        return None
    names = common[: common.index(stage) + 1]
    if any(row.first.get(name) != recorded[name] for row in witnesses for name in names):
        return with_lines(_start([]), Evidence.of("reference-neither", replicas=unreproduced))
    agree = Finding(Kind.REPLAYS_AGREE, [Evidence.of("reference-matches-replay", replicas=unreproduced)])
    if len(witnesses) > 1:
        line = Evidence.of("reference-on-all-replicas")
        return _start([], agree, Finding(Kind.ORIGINALS_DIFFER_WIDELY, [line]), *witnesses[0].findings)
    findings = [agree, Finding(Kind.ORIGINAL_DIFFERS, replicas=unreproduced), *witnesses[0].findings]
    if witnesses[0].loaded_by_workers and witnesses[0].samples_are_random:
        findings.append(Finding(Kind.SAMPLES_DIFFER, [Evidence.of("samples-random-in-workers")]))
    return _start(unreproduced, *findings, *_find_foreign(witnesses, stage))


def _start(suspects: list[int], *findings: Finding, **fields: Any) -> Decision:
    return with_findings(Decision("unexplained", suspects, [], **fields), *findings)


def _not_reproduced(witnesses: Sequence[Witness], last: str | None) -> list[int]:
    """Return the replicas whose first replay differs from the original step, up to the stage `last`."""
    return [r for r, row in enumerate(witnesses) if up_to(row.original, last) != up_to(row.first, last)]


def _replays_diverge_more(witnesses: Sequence[Witness]) -> bool:
    """Return True if replays diverge between replicas in a stage in which the originals agreed."""
    return any(
        len({row.original.get(stage) for row in witnesses}) == 1 < len({row.first.get(stage) for row in witnesses})
        for stage in STAGES
    )


def _find_astray(witnesses: Sequence[Witness], unreproduced: list[int], stage: str | None) -> Decision:
    """Describe replays that differ both from each other and from the original step."""
    original = split_into_groups([witness.original.get(stage or "", b"") for witness in witnesses])
    line = Evidence.of("replays-and-originals-differ", replicas=unreproduced)
    found = with_lines(_start(suspects_of(original), groups=original), line)
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


def _find_irreproducible(
    witnesses: Sequence[Witness], replica_ids: list[int], stage: str | None, last: str | None
) -> Decision:
    """Collect the findings where some replicas' replays differ from each other, or from an earlier agreed step."""
    varying = [r for r in replica_ids if up_to(witnesses[r].first, last) != up_to(witnesses[r].second, last)]
    # Where no replica reproduces itself, that singles out none of them: only the vote on the original step is left.
    suspects = replica_ids
    if len(replica_ids) == len(witnesses):
        suspects = suspects_of(split_into_groups([up_to(witness.original, stage) for witness in witnesses]))
    if not varying:
        steps = sorted({witness.unreproduced for witness in witnesses if witness.unreproduced is not None})
        return with_lines(
            _start(suspects), Evidence.of("replays-miss-agreed-step", replicas=replica_ids, step=steps[0])
        )
    replica_id = varying[0]
    witness = witnesses[replica_id]
    vary = Finding(Kind.REPLAYS_VARY, [Evidence.of("replays-vary", replicas=varying)])
    found = _start(suspects, vary, replica_against_itself=replica_id)
    if witness.first.get("batch") != witness.second.get("batch"):
        line = Evidence.of("batch-varies")
        differs = len({row.original.get("batch") for row in witnesses}) > 1
        return with_findings(found, Finding(Kind.SAMPLES_DIFFER, [line])) if differs else with_lines(found, line)
    place = witness.against_itself
    if place is None:
        return with_lines(found, Evidence.of("operators-agree-twice"))
    if stage is not None and not could_have_made(place.record, stage):
        line = Evidence.of("operator-varies-elsewhere", index=place.index, operator=place.record, stage=stage)
        return with_lines(found, line)
    if place.made_here:
        line = Evidence.of("operator-varies", index=place.index, operator=place.record)
        # The operator is to blame then, on every replica on which it was seen to vary.
        return with_findings(found, Finding(Kind.OPERATOR_VARIES, [line]), operator=place, suspects=replica_ids)
    line = _describe_varying(place)
    if _all_vary_alike(witnesses, last):
        return with_lines(found, line, operator=place)
    varies = [Finding(Kind.INPUT_VARIES, [line])] if _is_unreplayed(place) else []
    found = found if varies else with_lines(found, line)
    return with_findings(found, *varies, *witness.at_itself, operator=place)


def _describe_varying(place: OpDifference) -> Evidence:
    if not place.same_structure:
        return describe_structure(place, _TWO_REPLAYS, with_source=False)
    if not place.same_call:
        return describe_scalars(place, _TWO_REPLAYS)
    return Evidence.of("operator-inputs-differ", index=place.index, operator=place.record, inputs="other inputs")


def _is_unreplayed(place: OpDifference) -> bool:
    """Return True if what two replays gave to an operator came from outside of the replica's state."""
    if not place.same_call or place.one is None or place.other is None:
        return True
    if place.one.generator != place.other.generator:
        return True
    positions = differing_inputs([[place.one], [place.other]], 0)
    origins = [row.origins[position : position + 1] for row in (place.one, place.other) for position in positions]
    return bool(origins) and all(origin == (OUTSIDE,) for origin in origins)


def _all_vary_alike(witnesses: Sequence[Witness], last: str | None) -> bool:
    """Return True if the replays vary on all replicas in the same way, which does not divide the replicas."""
    return len(witnesses) > 1 and all(
        len({up_to(row, last) for row in rows}) == 1
        for rows in ([row.first for row in witnesses], [row.second for row in witnesses])
    )


def _find_one_time(witnesses: Sequence[Witness], unreproduced: list[int], stage: str | None) -> Decision:
    """Collect the findings where all replays agree, so that the divergence is not reproduced."""
    agree = Finding(Kind.REPLAYS_AGREE, [Evidence.of("replays-agree")])
    if _drawn_in_workers(witnesses, unreproduced):
        groups = split_into_groups([witness.original["batch"] for witness in witnesses])
        drawn = Finding(Kind.SAMPLES_DIFFER, [Evidence.of("samples-random-in-workers")])
        return _start(suspects_of(groups) or unreproduced, agree, drawn, groups=groups)
    anywhere = _not_reproduced(witnesses, None)
    if not unreproduced or 2 * len(anywhere) >= max(len(witnesses), 3):
        line = Evidence.of("originals-differ-widely", replicas=anywhere)
        widely = Finding(Kind.ORIGINALS_DIFFER_WIDELY, [line])
        return _start(anywhere, agree, widely, *merge_findings(witnesses, anywhere))
    line = Evidence.of("original-differs", replicas=unreproduced)
    reproduced = [r for r in range(len(witnesses)) if r not in unreproduced]
    return _start(
        unreproduced,
        agree,
        Finding(Kind.ORIGINAL_DIFFERS, [line], unreproduced),
        *merge_findings(witnesses, unreproduced),
        *_find_foreign(witnesses, stage),
        groups=[reproduced, *([r] for r in unreproduced)],
    )


def _find_foreign(witnesses: Sequence[Witness], stage: str | None) -> list[Finding]:
    """Find operators that are not PyTorch's and may have made a one-time difference."""
    names = sorted(
        {
            record.name
            for witness in witnesses
            for record in witness.records
            if not record.name.startswith(_TORCHS_OWN) and could_have_made(record, stage)
        }
    )
    return [Finding(Kind.FOREIGN_OPERATOR, [Evidence.of("operator-foreign", operators=names)])] if names else []


def _every_batch_differs(witnesses: Sequence[Witness]) -> bool:
    """Return True if batches diverged and no replica's replay loaded its original batch."""
    batches = [witness.original.get("batch") for witness in witnesses]
    again = [witness.first.get("batch") for witness in witnesses]
    return len(set(batches)) > 1 and all(one != other for one, other in zip(batches, again, strict=True))


def _drawn_in_workers(witnesses: Sequence[Witness], unreproduced: Sequence[int]) -> bool:
    """Return True if a batch that differs was drawn by worker processes, whose generators a replay does not have."""
    if not unreproduced or len({witness.original.get("batch") for witness in witnesses}) == 1:
        return False
    return any(witnesses[r].loaded_by_workers and witnesses[r].samples_are_random for r in unreproduced)


def _differs_from_itself(witness: Witness, last: str | None) -> bool:
    return witness.unreproduced is not None or up_to(witness.first, last) != up_to(witness.second, last)
