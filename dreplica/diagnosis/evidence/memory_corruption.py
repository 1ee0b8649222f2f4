"""Memory that no operator changed: on which replicas it happened, and which operator had written the contents."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Corruption, Decision, OpDifference, Witness, with_findings
from dreplica.diagnosis.evidence.provenance import differing_inputs, last_writer, left_unaccounted, reads_unaccounted
from dreplica.diagnosis.tracing.memory_tracker import ALLOCATED, OUTSIDE
from dreplica.diagnosis.tracing.op_tracer import OpRecord

FEW_BITS = 8
"""Number of differing bits that a fault of memory explains, in one tensor."""
MOST_FLIPPED_BITS = 64
"""More bits than this do not flip at once: code has written there."""
_MOST_NAMED = 3
"""Tensors named in a line of evidence."""
_WORDS = slice(24, 24 + 624 * 8)
"""Bytes of torch's CPU generator state that hold the Mersenne twister's 624 words; the counters are before them."""


def find_corruption(found: Decision, witnesses: Sequence[Witness], stage: str | None) -> Decision:
    """Find replicas whose memory was changed by no operator.

    Args:
        found: The decision so far, with the operator at which the replicas diverge, if there is one.
        witnesses: The observations of each replica, by replica id.
        stage: The first stage that differs.

    Returns:
        The decision with the suspects and the operator that had written the contents. Unchanged if no such memory is
        found. Contents whose origin is unknown on most replicas are an input from outside of the step.
    """
    place = found.operator
    corrupted: dict[int, Evidence] = {}
    few: list[Finding] = []
    outside: set[int] = set()
    diverged = _diverged_names(witnesses, stage)
    for replica_id, witness in enumerate(witnesses):
        if not witness.indices_intact:
            corrupted[replica_id] = Evidence.of("indices-changed", replica=replica_id)
            few += [Finding(Kind.FEW_BITS, replicas=[replica_id])] if 0 < witness.indices_bits <= FEW_BITS else []
        elif place is not None and place.same_structure and not place.inputs_agree:
            differing = differing_inputs([row.records for row in witnesses], place.index)
            positions = differing.intersection(reads_unaccounted(witness.records, witness.contents, place.index))
            if any(_is_outside(witness.records[place.index], position) for position in positions):
                outside.add(replica_id)
            elif positions:
                corrupted[replica_id] = Evidence.of(
                    "operator-read-changed-memory", replica=replica_id, index=place.index
                )
        elif place is None and stage is not None:
            names = [name for name in left_unaccounted(witness.records, witness.contents, stage) if name in diverged]
            if names:
                corrupted[replica_id] = Evidence.of(
                    "memory-changed", replica=replica_id, names=names[:_MOST_NAMED], stage=stage
                )
    if place is None and stage == "rng" and not corrupted:
        corrupted, few = _changed_generators(witnesses)
    too_many = 2 * len(corrupted) > len(witnesses)
    if outside or (place is not None and too_many):
        # What no operator wrote on most replicas is not memory that changed, but data from outside of the step.
        return with_findings(found, Finding(Kind.OUTSIDE_INPUT))
    if not corrupted or too_many:
        return found
    changed = Finding(Kind.MEMORY_CHANGED, list(corrupted.values()), list(corrupted))
    found = with_findings(found, changed, *few, suspects=list(corrupted))
    corrupted_id = next(iter(corrupted))
    intact_id = next(r for r in range(len(witnesses)) if r not in corrupted)
    if not witnesses[corrupted_id].indices_intact or stage == "rng":
        return found
    if place is not None:
        found = replace(found, corrupted=Corruption(corrupted_id, intact_id, place.index))
        return _with_writer(found, place, witnesses, corrupted)
    assert stage is not None
    unaccounted = left_unaccounted(witnesses[corrupted_id].records, witnesses[corrupted_id].contents, stage)
    name = next(name for name in unaccounted if name in diverged)
    return replace(found, corrupted=Corruption(corrupted_id, intact_id, None, stage, name))


def _is_outside(record: OpRecord, position: int) -> bool:
    """Return True if an operator read memory that no operator wrote and that is not part of the replica's state."""
    return record.origins[position : position + 1] in ((OUTSIDE,), (ALLOCATED,))


def _with_writer(
    found: Decision, place: OpDifference, witnesses: Sequence[Witness], corrupted: Mapping[int, Evidence]
) -> Decision:
    """Name the operator that had written the corrupted memory, rather than the one that read it."""
    intact = next(replica_id for replica_id in range(len(witnesses)) if replica_id not in corrupted)
    records, changed = witnesses[intact].records, witnesses[next(iter(corrupted))].records
    writer = last_writer(records, place.index, changed[place.index].inputs)
    if writer is None:
        return replace(found, operator=None)
    line = Evidence.of("memory-writer", index=writer, operator=records[writer])
    return replace(
        found,
        operator=OpDifference(writer, records[writer], changed[writer]),
        evidence=[*found.evidence, line],
    )


def _diverged_names(witnesses: Sequence[Witness], stage: str | None) -> set[str]:
    """Return the tensors that do not have the same contents on all replicas after the step."""
    rows = [witness.contents.after.get(stage or "", {}) for witness in witnesses]
    return {name for name in set().union(*rows) if len({row.get(name) for row in rows}) > 1}


def _changed_generators(witnesses: Sequence[Witness]) -> tuple[dict[int, Evidence], list[Finding]]:
    """Find generators changed by no operator, in few bits: one that was seeded again differs in half of them."""
    intact = [replica_id for replica_id, witness in enumerate(witnesses) if not witness.generator_changed]
    corrupted, few = {}, []
    for replica_id in sorted(set(range(len(witnesses))) - set(intact)) if intact else ():
        bits = flipped_bits(witnesses[intact[0]].generator, witnesses[replica_id].generator)
        if bits:
            corrupted[replica_id] = Evidence.of("generator-changed", replica=replica_id, bits=bits)
            few += [Finding(Kind.FEW_BITS, replicas=[replica_id])] if bits <= FEW_BITS else []
    return corrupted, few


def flipped_bits(one: bytes, other: bytes) -> int:
    """Count the bits in which two states of torch's CPU generator differ, if a memory fault may explain it.

    Args:
        one: One state, as `torch.Generator.get_state` returns it.
        other: The other state.

    Returns:
        The number of bits, or 0 where the states differ by draws: their counters differ then, or most of their words.
    """
    if one[: _WORDS.start] != other[: _WORDS.start] or one[_WORDS.stop :] != other[_WORDS.stop :]:
        return 0
    bits = sum((a ^ b).bit_count() for a, b in zip(one[_WORDS], other[_WORDS], strict=True))
    return bits if bits <= MOST_FLIPPED_BITS else 0
