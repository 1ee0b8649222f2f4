"""Alignment of two records of a step: which operators correspond, where views and repeated results are left out.

A view, and an operator that computes again what was there before (a recomputed activation, a copy), cannot be where
numbers begin to differ. They are skipped where only one side has them.
"""

from collections.abc import Iterator, Sequence

from dreplica.diagnosis.tracing.op_tracer import OpRecord

DIGEST_BYTES = 16
_LOOK_AHEAD = 200
"""Number of operators within which the sides must be alike again for one of them to have extra operators."""


def align(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> Iterator[tuple[int, int]]:
    """Yield the positions of corresponding operators, and last those at which the sides have different operators.

    Args:
        one: The operators of one run.
        other: The operators of the other run.

    Yields:
        Positions in `one` and `other`. A position may be behind the end of its side.
    """
    sides = one, other
    known: tuple[set[bytes], set[bytes]] = set(), set()
    left_out: tuple[set[int], set[int]] = set(), set()
    at = [0, 0]
    while at[0] < len(one) and at[1] < len(other):
        pair = one[at[0]], other[at[1]]
        if not pair[0].same_operator(pair[1]):
            skipped = [side for side in (0, 1) if _is_repeated(pair[side], known[side], left_out[side])]
            # Of two that could be skipped, the one whose successor continues the other side.
            ahead = [side for side in skipped if at[side] + 1 < len(sides[side])]
            fitting = [side for side in ahead if sides[side][at[side] + 1].same_operator(pair[1 - side])]
            for side in fitting[:1] or skipped:
                left_out[side].add(at[side])
                at[side] += 1
            if skipped:
                continue
            yield at[0], at[1]
            return
        for side in (0, 1):
            known[side].update(split(pair[side].outputs) if not pair[side].is_view else ())
        yield at[0], at[1]
        at = [at[0] + 1, at[1] + 1]
    for side in (0, 1):  # what is left must be repeated too
        while at[side] < len(sides[side]) and _is_repeated(sides[side][at[side]], known[side], left_out[side]):
            left_out[side].add(at[side])
            at[side] += 1
    if at[0] < len(one) or at[1] < len(other):
        yield at[0], at[1]


def extra_side(one: Sequence[OpRecord], other: Sequence[OpRecord], at: tuple[int, int]) -> int | None:
    """Return the side that has operators at a position which the other side lacks and continues without.

    Args:
        one: The operators of one run.
        other: The operators of the other run.
        at: Positions at which the sides have different operators.

    Returns:
        0 for `one`, 1 for `other`, None if both have other operators.
    """
    sides = one, other
    for ahead in range(1, _LOOK_AHEAD):
        for side in (0, 1):
            position, across = at[side] + ahead, at[1 - side]
            if position > len(sides[side]) or across > len(sides[1 - side]):
                continue
            if position == len(sides[side]) and across == len(sides[1 - side]):
                return side
            alike = sides[side][position : position + 1] and sides[1 - side][across : across + 1]
            if alike and sides[side][position].same_operator(alike[0]):
                return side
    return None


def split(digests: bytes) -> list[bytes]:
    """Return the single digests of several."""
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def _is_repeated(record: OpRecord, known: set[bytes], left_out: set[int]) -> bool:
    """Return True if an operator makes nothing new: a view, or results that its side had before.

    Args:
        record: The operator.
        known: Digests of its side's earlier results.
        left_out: Positions of its side's operators that make nothing new. Only their results may be overwritten.
    """
    if record.is_view:
        return True
    if record.generator or record.returned or not record.outputs or not known.issuperset(split(record.outputs)):
        return False
    in_place = record.name.partition(".")[2].rpartition(".")[0].endswith("_")
    return not in_place or bool(left_out.intersection(record.origins))
