"""What differs at the first operator that differs between two records of a step, as findings.

All functions are pure. Nothing is reported that an earlier operator of the step may have made: what is left entered the
step there.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import OpDifference, Witness
from dreplica.diagnosis.evidence.place_alignment import split
from dreplica.diagnosis.tracing.memory_tracker import OUTSIDE, Unwritten
from dreplica.diagnosis.tracing.op_tracer import OpRecord


@dataclass(frozen=True)
class Side:
    """One of the two records that are compared."""

    records: Sequence[OpRecord]
    """The operators of the step."""
    where: str
    """Where it was recorded, such as `on replica 1`."""
    before: frozenset[bytes] = frozenset()
    """Digests of the contents that the step began with."""


def findings_at(place: OpDifference, witnesses: Sequence[Witness], groups: Sequence[Sequence[int]]) -> list[Finding]:
    """Return what differs at the operator at which the first two groups of replicas diverge.

    Args:
        place: The operator, as `with_operator` has found it.
        witnesses: The observations of each replica, by replica id.
        groups: At least two groups of replicas.

    Returns:
        The findings. Empty if the operator alone made the difference, or nothing is known of its inputs.
    """
    one, other = (
        Side(witnesses[r].records, f"on replica {r}", witnesses[r].contents.before)
        for r in sorted((groups[0][0], groups[1][0]))
    )
    return findings_between(place, one, other)


def findings_between(place: OpDifference, one: Side, other: Side) -> list[Finding]:
    """Return what differs at an operator between two records of a step.

    Args:
        place: The operator.
        one: The first record.
        other: The second record.
    """
    if not place.same_structure:
        return _extra_draw(place, one, other)
    assert place.one is not None
    assert place.other is not None
    if place.one.scalars != place.other.scalars and place.one.inputs == place.other.inputs:
        if _made_by_operators(place, one, other):
            return []
        if _line_of(place.one) != _line_of(place.other):  # two calls, of which each is on one side only
            return [_other_calls(place, one, other)]
        return [_host_value(place, one, other)]
    if place.one.generator != place.other.generator and place.one.inputs == place.other.inputs:
        return [Finding(Kind.OTHER_DRAW, [_draw_line(place.one), *_first_draws(one, other)])]
    return _inputs(place, one, other) if place.one.inputs != place.other.inputs else []


def findings_of_replays(
    place: OpDifference | None, first: Sequence[OpRecord], second: Sequence[OpRecord], before: frozenset[bytes]
) -> list[Finding]:
    """Return what differs at an operator between two replays on one replica.

    Args:
        place: The first operator at which the replays differ; None if there is none.
        first: The operators of the first replay.
        second: The operators of the second replay.
        before: Digests of the contents that both began with.
    """
    sides = Side(first, "in one replay", before), Side(second, "in the other", before)
    return [] if place is None else findings_between(place, *sides)


def spell(record: OpRecord) -> str:
    """Return an operator with its module, phase and line of code."""
    return f"{record} at {record.source}" if record.source else str(record)


def _made_by_operators(place: OpDifference, one: Side, other: Side) -> bool:
    """Return True if a number that Python read from a tensor before differs, from which others may be computed."""
    rows = zip(one.records[: place.position(False)], other.records[: place.position(True)], strict=False)
    return any(a.returned and (a.inputs, a.returned) != (b.inputs, b.returned) for a, b in rows)


def _line_of(record: OpRecord) -> str:
    """Return the file, without its folder, which may differ between hosts, and the line that called an operator."""
    return os.path.basename(record.source)


def _other_calls(place: OpDifference, one: Side, other: Side) -> Finding:
    assert place.one is not None
    assert place.other is not None
    line = Evidence.of(
        "other-calls",
        operator=place.record,
        one=place.one.source or "the training step",
        other=place.other.source or "the training step",
        where_one=one.where,
        where_other=other.where,
    )
    return Finding(Kind.OTHER_OPERATORS, [line])


def _host_value(place: OpDifference, one: Side, other: Side) -> Finding:
    assert place.one is not None
    assert place.other is not None
    line = Evidence.of(
        "host-value",
        operator=spell(place.one),
        values=[place.one.scalars, place.other.scalars],
        one=place.one.scalars or "nothing",
        other=place.other.scalars or "nothing",
        where_one=one.where,
        where_other=other.where,
        source=place.one.source,
    )
    lines = [line]
    if _permuted(place, one, other, lambda record: (record.inputs, record.scalars)):
        lines.append(Evidence.of("host-values-permuted", source=place.one.source))
    return Finding(Kind.OTHER_HOST_VALUE, lines)


def _permuted(place: OpDifference, one: Side, other: Side, of: Callable[[OpRecord], tuple[bytes, str]]) -> bool:
    """Return True if the calls of an operator at one line are given the same values on both sides, in another order."""
    assert place.one is not None
    rows = []
    for side, in_other in ((one, False), (other, True)):
        same = [r for r in side.records[place.position(in_other) :] if _same_line(r, place.one)]
        rows.append([of(record) for record in same])
    return len(rows[0]) > 1 and rows[0] != rows[1] and Counter(rows[0]) == Counter(rows[1])


def _same_line(record: OpRecord, other: OpRecord) -> bool:
    return record.same_operator(other) and record.source == other.source


def _draw_line(record: OpRecord) -> Evidence:
    return Evidence.of("draw-differs", operator=spell(record), source=record.source)


def _first_draws(one: Side, other: Side) -> list[Evidence]:
    """Return the first draw of the step on each side."""
    firsts = [next((r for r in side.records if r.generator), None) for side in (one, other)]
    texts = ["none" if record is None else spell(record) for record in firsts]
    return [
        Evidence.of(
            "first-draws", one=texts[0], other=texts[1], where_one=one.where, where_other=other.where, draws=texts
        )
    ]


def _extra_draw(place: OpDifference, one: Side, other: Side) -> list[Finding]:
    """Report a draw that only one side has, and whose numbers it does not use, or that it repeats."""
    extra = place.extra
    if extra is None or not extra.generator:
        return []
    in_other = extra is not place.one
    side, across = (other, one) if in_other else (one, other)
    position = place.position(in_other)
    drawn = set(split(extra.outputs))
    used = any(drawn.intersection(split(record.inputs)) for record in side.records[position + 1 :])
    repeated = any(
        (record.name, record.module) == (extra.name, extra.module)
        for record in [*side.records[:position], *across.records]
    )
    if used and not repeated:
        return []
    line = Evidence.of("draw-extra", operator=spell(extra), where=side.where, source=extra.source)
    return [Finding(Kind.OTHER_DRAW, [line, *_first_draws(one, other)])]


def _inputs(place: OpDifference, one: Side, other: Side) -> list[Finding]:
    """Report tensors that the operator reads and that no earlier operator made different."""
    assert place.one is not None
    assert place.other is not None
    mine, theirs = split(place.one.inputs), split(place.other.inputs)
    differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    unwritten = [_unwritten_only(place, i) for i in differing]
    found = [each for each in unwritten if each is not None]
    if found and len(found) == len(differing):
        return [_unwritten_finding(place.one, found[0])]
    permuted = sorted(mine) == sorted(theirs) or _permuted(
        place, one, other, lambda record: (record.inputs, record.scalars)
    )
    if permuted:
        line = Evidence.of("inputs-permuted", operator=spell(place.one), source=place.one.source)
        return [Finding(Kind.OTHER_ORDER, [line])]
    outside = [i for i in differing if all(_origin(record, i) == OUTSIDE for record in (place.one, place.other))]
    if outside:
        line = Evidence.of("outside-input", operator=spell(place.one), source=place.one.source, inputs=outside)
        return [Finding(Kind.OUTSIDE_INPUT, [line])]
    if all(mine[i] in _known(other, place, True) and theirs[i] in _known(one, place, False) for i in differing):
        line = Evidence.of("other-tensor-read", operator=spell(place.one), source=place.one.source, inputs=differing)
        return [Finding(Kind.OTHER_TENSOR, [line])]
    return []


def _origin(record: OpRecord | None, position: int) -> int | None:
    return record.origins[position] if record is not None and position < len(record.origins) else None


def _known(side: Side, place: OpDifference, in_other: bool) -> set[bytes]:
    """Return the contents that a side had before the operator."""
    earlier = side.records[: place.position(in_other)]
    return set(side.before).union(*(split(r.outputs) for r in earlier if not r.is_view))


def _unwritten_only(place: OpDifference, position: int) -> Unwritten | None:
    """Return the memory without contents in an input, if the input is the same on both sides except for it."""
    rows = [
        next((each for each in record.unwritten if each.position == position), None)
        for record in (place.one, place.other)
        if record is not None
    ]
    if len(rows) != 2 or rows[0] is None or rows[1] is None or rows[0].rest != rows[1].rest:
        return None
    return rows[0]


def _unwritten_finding(reader: OpRecord, unwritten: Unwritten) -> Finding:
    line = Evidence.of(
        "unwritten-read",
        operator=spell(reader),
        elements=unwritten.elements,
        total=unwritten.total,
        allocator=unwritten.allocator,
        allocated_at=unwritten.source or "unknown",
        source=reader.source,
    )
    return Finding(Kind.UNWRITTEN_MEMORY, [line])
