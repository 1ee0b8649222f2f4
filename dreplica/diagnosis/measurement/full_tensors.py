"""Element-wise comparison of tensors: whether a difference is a few bits, and whose result of an operator is wrong."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import FEW_BITS, MOST_FLIPPED_BITS
from dreplica.diagnosis.evidence.observation import Decision, with_findings, with_lines
from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements
from dreplica.diagnosis.measurement.float64_arbitration import Arbitration, arbitrate
from dreplica.diagnosis.replay.replay_run import Repeats
from dreplica.diagnosis.tracing.op_tracer import Captured
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel

_FEW_BITS_OF_A_NUMBER = 4
"""Number of flipped bits that a fault explains in a single changed number with a fraction.

Writing another value changes about half of the mantissa.
"""


def compare_memory(decision: Decision, replayer: Repeats, indices: Tensor, channel: Channel) -> Decision:
    """Compare memory that no operator wrote to with an intact replica's.

    A fault flips few bits. If many bits differ, code other than a torch operator has written to the memory, such as
    NumPy or a C extension. If all elements of the intact side are the same number, its digest may have matched by
    chance, because all tensors of zeros are equal.

    Args:
        decision: The decision so far. Unchanged if it names no corrupted memory.
        replayer: Replays the step.
        indices: Sample indices of the step, shape (batch,), int64.
        channel: The control channel between all replicas.

    Returns:
        The decision with the differences as findings.

    Note:
        Collective: call on every rank.
    """
    corrupted = decision.corrupted
    if corrupted is None:
        return decision

    def look() -> list[Tensor]:
        if channel.rank not in (corrupted.replica_id, corrupted.intact_id):
            return []
        again = replayer.again(indices, corrupted.index)
        if corrupted.index is not None:
            return again.tracer.captured.inputs if again.tracer.captured else []
        assert corrupted.stage is not None
        assert corrupted.tensor is not None
        tensor = replayer.replayed(corrupted.stage, corrupted.tensor)
        return [] if tensor is None else [tensor]

    rows = channel.gather(attempt(channel, look))
    pairs = list(zip(rows[corrupted.intact_id], rows[corrupted.replica_id], strict=False))
    differing = [(intact, found) for intact, other in pairs if (found := compare(intact, other)) is not None]
    decision = with_lines(decision, *(Evidence.of("elements-differ", difference=found) for _, found in differing))
    doubts = [
        doubt for intact, found in differing if (doubt := _doubt_flip(intact, found, corrupted.index)) is not None
    ]
    if doubts:  # It was no operator that wrote there, so the last writer is unknown.
        return with_findings(decision, *doubts, operator=None)
    # The operator may read several views of what one operator had written.
    if differing and sum(found.differing_bits for _, found in differing if not isinstance(found, str)) <= FEW_BITS:
        return with_findings(decision, Finding(Kind.FEW_BITS, replicas=[corrupted.replica_id]))
    return decision if differing else replace(decision, operator=None)


def _doubt_flip(intact: Tensor, difference: Difference | str, index: int | None) -> Finding | None:
    """Return what speaks against flipped bits, or None."""
    if isinstance(difference, str):
        return Finding(Kind.OUTSIDE_INPUT, [Evidence.of("other-tensor")])
    if was_written(difference):
        bits, elements = difference.differing_bits, difference.num_differing
        return Finding(Kind.MANY_BITS, [Evidence.of("memory-overwritten", bits=bits, elements=elements)])
    if index is not None and bool((intact == intact.flatten()[0]).all()):
        return Finding(Kind.OUTSIDE_INPUT, [Evidence.of("memory-constant")])
    return None


def was_written(difference: Difference) -> bool:
    """Return True if more has changed than a memory fault flips: a few bits, and fewer in a number with a fraction.

    A number that code has overwritten differs in about half of the bits of its mantissa. An integer may be a counter,
    most of whose bits are zero, so a few changed bits can be a fault as well as a write.
    """
    value = difference.first_values[0]
    is_fraction = difference.num_differing == 1 and isinstance(value, float) and not value.is_integer()
    return difference.differing_bits > (_FEW_BITS_OF_A_NUMBER if is_fraction else FEW_BITS)


def compare_outputs(
    decision: Decision, replayer: Repeats, indices: Tensor, channel: Channel, arbitrates: bool, votes: bool = True
) -> Decision:
    """Run the operator in question once more on both sides, and compare the results.

    Args:
        decision: The decision so far, which names the operator and the two sides.
        replayer: Replays the step.
        indices: Sample indices of the step, shape (batch,), int64.
        channel: The control channel between all replicas.
        arbitrates: True to run the operator in float64, too, to find the side that is wrong.
        votes: True to take the result of the majority for right where float64 cannot tell.

    Returns:
        The decision with more findings, and the suspects that the float64 run has found.

    Note:
        Collective: call on every rank.
    """
    place = decision.operator
    if place is None or not place.made_here:
        return decision
    replica_id = decision.replica_against_itself
    if replica_id is not None:

        def describe() -> list[Evidence]:
            if channel.rank != replica_id:
                return []
            one, other = (replayer.again(indices, place.index).tracer.captured for _ in range(2))
            return [_describe_outputs(one.outputs, other.outputs)] if one and other else []

        return with_lines(decision, *channel.gather(attempt(channel, describe))[replica_id])
    if decision.sides is None:
        return decision
    takes_part = channel.rank in decision.sides
    captured = attempt(channel, lambda: replayer.again(indices, place.index).tracer.captured if takes_part else None)
    outputs = channel.gather(captured.outputs if captured else None)
    one, other = (outputs[side] for side in decision.sides)
    decision = with_lines(decision, _describe_outputs(one, other))
    if Kind.OPERATOR_MADE_IT not in decision.kinds or not arbitrates:
        return decision
    if any(is_rewritten(a, b) for a, b in zip(one, other, strict=False)):
        line = Evidence.of("output-rewritten")
        decision = with_findings(decision, Finding(Kind.MANY_BITS, [line]))
    return _arbitrate(decision, captured, outputs, channel, votes)


def is_rewritten(one: Tensor, other: Tensor) -> bool:
    """Return True if all bits of many elements differ, as code makes it and no defective unit does.

    Elements that are zero on both sides do not count: many computations leave them.
    """
    difference = compare(one, other)
    if difference is None or isinstance(difference, str):
        return difference is not None
    counted = int(((one != 0) | (other != 0)).sum())
    many = difference.num_differing > MOST_FLIPPED_BITS and 2 * difference.num_differing > counted
    return many and difference.differing_bits > _FEW_BITS_OF_A_NUMBER * difference.num_differing


def _arbitrate(
    decision: Decision, captured: Captured | None, outputs: Sequence[Any], channel: Channel, votes: bool
) -> Decision:
    """Run the operator in float64 on each side, and make the side that is wrong the suspect, majority or not."""
    assert decision.sides is not None
    sides = decision.sides

    def judge() -> Arbitration | None:
        return None if captured is None else arbitrate(captured, [outputs[side] for side in sides], sides)

    try:
        rows = channel.gather(attempt(channel, judge))
    except AttemptFailed as error:
        return _vote(with_lines(decision, Evidence.of("float64-failed", error=error)), votes)
    judges = {replica_id: row for replica_id, row in enumerate(rows) if row is not None}
    if not judges:
        return _vote(with_lines(decision, Evidence.of("float64-no-bound")), votes)
    trusted = {replica_id: row for replica_id, row in judges.items() if row.trusted}
    lines = [Evidence.of("float64-not-trusted", replica=replica_id) for replica_id in judges.keys() - trusted.keys()]
    heard = next(iter(trusted.values()), None)
    if heard is None or any(row.possible != heard.possible for row in trusted.values()):
        return _vote(with_lines(decision, *lines, Evidence.of("float64-disagrees")), votes)
    decision = with_lines(decision, *lines, *heard.evidence)
    wrong = [side for side, possible in zip(sides, heard.possible, strict=True) if not possible]
    if len(wrong) == 1:
        (whole_group,) = (ids for ids in decision.groups or [wrong] if wrong[0] in ids)
        proved = Finding(Kind.PROVED_WRONG, replicas=whole_group)
        return with_findings(decision, proved, suspects=whole_group, settled=True)
    line = Evidence.of("float64-neither-possible" if wrong else "float64-both-possible")
    return with_findings(decision, Finding(Kind.SEVERAL_RESULTS if wrong else Kind.BOTH_POSSIBLE, [line]))


def _vote(decision: Decision, votes: bool) -> Decision:
    """Take the majority's result for right, if there is a majority and it may vote."""
    if not decision.suspects:
        return decision
    if not votes:
        return with_lines(decision, Evidence.of("vote-only"))
    return with_findings(decision, Finding(Kind.PROVED_WRONG, replicas=decision.suspects))


def compare(one: Tensor, other: Tensor) -> Difference | str | None:
    """Return the difference of two tensors, a text if shape or dtype differ, or None if they are equal."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} on one side, {other.dtype} {tuple(other.shape)} on the other"
    return compare_elements(one, other)


def _describe_outputs(one: Sequence[Tensor], other: Sequence[Tensor]) -> Evidence:
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        difference = compare(a, b)
        if difference is not None:
            ulp = None if isinstance(difference, str) else difference.max_ulp
            return Evidence.of("output-differs", output=number, difference=difference, max_ulp=ulp)
    return Evidence.of("outputs-equal-when-repeated")
