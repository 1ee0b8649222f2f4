"""Memory that was changed behind the operators' backs: on which replicas, and what had been written there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dreplica.diagnosis.evidence.observation import Decision, OpDifference, Struck, Witness
from dreplica.diagnosis.evidence.provenance import differing_inputs, last_writer, left_unaccounted, reads_unaccounted

MOST_STRUCK_BITS = 64
"""More bits than that do not flip at once: something has written there."""

_WORDS = slice(24, 24 + 624 * 8)
"""Bytes of torch's CPU generator state that hold the Mersenne twister's 624 words; before them stand the counters."""


def struck_memory(found: Decision, witnesses: Sequence[Witness], stage: str | None) -> Decision | None:
    """`persistent-fault`, where some replicas' memory was changed behind the operators' backs; None where none was."""
    place = found.operator
    struck: dict[int, str] = {}
    parted = _parted_names(witnesses, stage)
    for replica_id, witness in enumerate(witnesses):
        if not witness.indices_intact:
            struck[replica_id] = "used other indices than it was given"
        elif place is not None and place.same_structure and not place.inputs_agree:
            # Only where replicas differ: a generator's state, an input of operators that draw, is never accounted for.
            differing = differing_inputs([row.records for row in witnesses], place.index)
            if differing.intersection(reads_unaccounted(witness.records, witness.contents, place.index)):
                struck[replica_id] = f"operator {place.index} read contents that nothing had written"
        elif place is None and stage is not None:
            names = [name for name in left_unaccounted(witness.records, witness.contents, stage) if name in parted]
            if names:
                struck[replica_id] = f"{', '.join(names[:3])} of {stage} hold contents that no operator wrote"
    if place is None and stage == "rng" and not struck:
        struck = _struck_generators(witnesses)
    if not struck or 2 * len(struck) > len(witnesses):
        return None  # on most of them it is not memory, but data that came in from outside of operators
    lines = [f"replica {replica_id}: {line}; memory changed by itself" for replica_id, line in struck.items()]
    found = replace(found, cause="persistent-fault", suspects=list(struck), evidence=[*found.evidence, *lines])
    struck_id, sound_id = next(iter(struck)), next(r for r in range(len(witnesses)) if r not in struck)
    if not witnesses[struck_id].indices_intact or stage == "rng":
        return found
    if place is not None:
        found = replace(found, struck=Struck(struck_id, sound_id, place.index))
        return _with_writer(found, place, witnesses, struck)
    assert stage is not None
    unaccounted = left_unaccounted(witnesses[struck_id].records, witnesses[struck_id].contents, stage)
    name = next(name for name in unaccounted if name in parted)
    return replace(found, struck=Struck(struck_id, sound_id, None, stage, name))


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


def _parted_names(witnesses: Sequence[Witness], stage: str | None) -> set[str]:
    """The tensors that were not left with the same contents on all replicas."""
    rows = [witness.contents.after.get(stage or "", {}) for witness in witnesses]
    return {name for name in set().union(*rows) if len({row.get(name) for row in rows}) > 1}


def _struck_generators(witnesses: Sequence[Witness]) -> dict[int, str]:
    """Generators changed by no operator, in few bits: one that was seeded again differs in half of them."""
    sound = [replica_id for replica_id, witness in enumerate(witnesses) if not witness.generator_struck]
    struck = {}
    for replica_id in sorted(set(range(len(witnesses))) - set(sound)) if sound else ():
        bits = flipped_bits(witnesses[sound[0]].generator, witnesses[replica_id].generator)
        if bits:
            struck[replica_id] = f"torch's generator was changed by no operator, and differs in {bits} bits"
    return struck


def flipped_bits(one: bytes, other: bytes) -> int:
    """In how many bits two states of torch's CPU generator differ, if a fault of memory may have done it; otherwise 0.

    Between states that were drawn from otherwise the counters differ, or most of the words.
    """
    if one[: _WORDS.start] != other[: _WORDS.start] or one[_WORDS.stop :] != other[_WORDS.stop :]:
        return 0
    bits = sum((a ^ b).bit_count() for a, b in zip(one[_WORDS], other[_WORDS], strict=True))
    return bits if bits <= MOST_STRUCK_BITS else 0
