"""Memory that was changed behind the operators' backs: on which replicas, and what had been written there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dreplica.diagnosis.provenance import last_writer, left_unaccounted, reads_unaccounted
from dreplica.diagnosis.witness import Decision, OpDifference, Witness

_MOST_STRUCK_BITS = 64


def struck_memory(found: Decision, witnesses: Sequence[Witness], stage: str | None) -> Decision | None:
    """`persistent-fault`, where some replicas' memory was changed behind the operators' backs; None where none was."""
    place = found.operator
    struck: dict[int, str] = {}
    for replica_id, witness in enumerate(witnesses):
        if not witness.indices_intact:
            struck[replica_id] = "used other indices than it was given"
        elif place is not None and place.same_structure and not place.inputs_agree:
            if reads_unaccounted(witness.records, witness.contents, place.index):
                struck[replica_id] = f"operator {place.index} read contents that nothing had written"
        elif place is None and stage is not None:
            names = left_unaccounted(witness.records, witness.contents, stage)
            if names:
                struck[replica_id] = f"{', '.join(names[:3])} of {stage} hold contents that no operator wrote"
    if len(struck) == len(witnesses):
        return None  # not memory, then, but data that came in from outside of operators on all of them
    if place is None and stage == "rng":
        struck = _struck_generators(found, witnesses)
    if not struck:
        return None
    lines = [f"replica {replica_id}: {line}; memory changed by itself" for replica_id, line in struck.items()]
    suspects = found.suspects or list(struck)
    found = replace(found, cause="persistent-fault", suspects=suspects, evidence=[*found.evidence, *lines])
    return found if place is None else _with_writer(found, place, witnesses, struck)


def _with_writer(
    found: Decision, place: OpDifference, witnesses: Sequence[Witness], struck: Mapping[int, str]
) -> Decision:
    """Names, rather than the operator that read the struck memory, the one that had written it."""
    sound = next(replica_id for replica_id in range(len(witnesses)) if replica_id not in struck)
    records, changed = witnesses[sound].records, witnesses[next(iter(struck))].records
    writer = last_writer(records, place.index, changed[place.index].inputs)
    if writer is None:
        return replace(found, operator=None)
    line = f"it had been written by operator {writer}, {records[writer]}"
    return replace(
        found,
        operator=OpDifference(writer, records[writer], changed[writer]),
        evidence=[*found.evidence, line],
    )


def _struck_generators(found: Decision, witnesses: Sequence[Witness]) -> dict[int, str]:
    """Generators in almost the same state: one that drew more, or was seeded again, differs in half of its bits."""
    assert found.classes is not None
    sound = [replica_id for replica_id, witness in enumerate(witnesses) if not witness.generator_struck]
    if not sound:
        return {}
    reference = witnesses[sound[0]].generator
    struck = {}
    for replica_id in set(range(len(witnesses))) - set(sound):
        pairs = zip(reference, witnesses[replica_id].generator, strict=True)
        bits = sum((one ^ other).bit_count() for one, other in pairs)
        if 0 < bits <= _MOST_STRUCK_BITS:
            struck[replica_id] = (
                f"torch's generator was changed by no operator, and differs in {bits} of {8 * len(reference)} bits"
            )
    return struck
