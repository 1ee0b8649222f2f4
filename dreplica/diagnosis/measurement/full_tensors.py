"""Element-wise comparison of tensors, to confirm or reject a cause that digests suggest."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.evidence.memory_corruption import MOST_FLIPPED_BITS
from dreplica.diagnosis.evidence.observation import Decision
from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements
from dreplica.diagnosis.measurement.float64_arbitration import Arbitration, arbitrate
from dreplica.diagnosis.replay.replay_run import Repeats, Replayer
from dreplica.diagnosis.tracing.op_tracer import Captured
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel
from dreplica.state.stages import Stage

_FEW_BITS = 8
"""Number of flipped bits that a memory fault explains anywhere. More bits must be scattered over the tensor."""
_FEW_BITS_OF_A_NUMBER = 4
"""Number of flipped bits that a fault explains in a single changed number with a fraction.

Writing another value changes about half of the mantissa.
"""
_MAX_CORRUPTED_TENSORS = 2
"""Number of tensors of a stage that one memory fault can reach: one, or two that are adjacent."""
_REACHED_DIRECTLY = {"optimizer", "weights"}
"""Stages in which a fault is visible directly. In earlier ones, a forward or backward pass has spread it."""


def add(decision: Decision, lines: Sequence[Evidence], **changes: Any) -> Decision:
    """Return a decision with more evidence.

    Args:
        decision: The decision so far.
        lines: The evidence to append.
        **changes: Fields of the decision to change.
    """
    return replace(decision, evidence=[*decision.evidence, *lines], **changes)


def doubt_corruption(decision: Decision, replayer: Repeats, indices: Tensor, channel: Channel) -> Decision:
    """Check that memory which no operator wrote to differs as after a memory fault.

    A fault flips few bits. If many bits differ, code other than a torch operator has written to the memory, such as
    NumPy or a C extension. If all elements of the intact side are the same number, its digest may have matched by
    chance, because all tensors of zeros are equal.

    Args:
        decision: The decision so far. Unchanged if it names no corrupted memory.
        replayer: Replays the step.
        indices: Sample indices of the step, shape (batch,), int64.
        channel: The control channel between all replicas.

    Returns:
        The decision with the differences as evidence. Its cause is `unexplained` if they are not those of a fault.

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
    lines, doubts = [], []
    for intact, other in pairs:
        difference = compare(intact, other)
        if difference is None:
            continue
        lines.append(Evidence.of("elements-differ", difference=difference))
        if isinstance(difference, str):
            doubts.append(Evidence.of("other-tensor"))
        elif was_written(difference):
            bits, elements = difference.differing_bits, difference.num_differing
            doubts.append(Evidence.of("memory-overwritten", bits=bits, elements=elements))
        elif corrupted.index is not None and bool((intact == intact.flatten()[0]).all()):
            doubts.append(Evidence.of("memory-constant"))
    decision = add(decision, [*lines, *doubts])
    # It was no operator that wrote there, so the last writer is unknown.
    return replace(decision, cause="unexplained", operator=None) if doubts or not lines else decision


def was_written(difference: Difference) -> bool:
    """Return True if more has changed than a memory fault flips: a few bits, or some more that are scattered.

    A number that code has overwritten differs in about half of the bits of its mantissa. An integer may be a counter,
    most of whose bits are zero, so a few changed bits can be a fault as well as a write.
    """
    bits, elements = difference.differing_bits, difference.num_differing
    if bits > _FEW_BITS:
        return bits > MOST_FLIPPED_BITS or bits > 2 * elements or 2 * elements > difference.num_elements
    value = difference.first_values[0]
    has_fraction = isinstance(value, float) and not value.is_integer()
    return elements == 1 and has_fraction and bits > _FEW_BITS_OF_A_NUMBER


def doubt_moved(
    decision: Decision,
    found: Verdict,
    original: Mapping[str, Stage],
    again: Mapping[str, Stage],
    replayer: Replayer,
    channel: Channel,
) -> Decision:
    """Check that the changes of a presumed transient fault are those of a fault.

    Args:
        decision: The decision so far. Unchanged if its cause is not `transient-fault`.
        found: The verdict that names stage and tensor.
        original: This replica's stages at the step, as compared.
        again: This replica's stages at the step, as replayed.
        replayer: Has run the replay.
        channel: The control channel between all replicas.

    Returns:
        The decision with the differences as evidence. Its cause is `unexplained` if they are not those of a fault.

    Note:
        Collective: call on every rank.
    """
    if decision.cause != "transient-fault" or found.stage is None or found.tensor is None:
        return decision
    parts = channel.rank, found.stage, found.tensor, original[found.stage], again[found.stage], replayer
    is_suspect = channel.rank in decision.suspects
    rows = channel.gather(attempt(channel, lambda: _look_at_moved(*parts) if is_suspect else ([], [])))
    lines, doubts = ([line for row in rows for line in row[i]] for i in (0, 1))
    return add(decision, [*lines, *doubts], cause="unexplained" if doubts else decision.cause)


def _look_at_moved(
    rank: int, stage: str, tensor: str, original: Stage, again: Stage, replayer: Replayer
) -> tuple[list[Evidence], list[Evidence]]:
    """Compare a suspect's tensor with the replay, and return evidence for and against a memory fault."""
    lines, doubts = [], []
    happened, replayed = original.entries(), again.entries()
    moved = [name for name in happened if happened[name] != replayed.get(name)]
    if stage in _REACHED_DIRECTLY and len(moved) > _MAX_CORRUPTED_TENSORS:
        doubts.append(Evidence.of("many-tensors-changed", replica=rank, count=len(moved), stage=stage))
    pair = replayer.present_and_replayed(stage, tensor)
    difference = compare(*pair) if pair else None
    if difference is not None:
        lines.append(
            Evidence.of("replica-elements-differ", replica=rank, tensor=tensor, stage=stage, difference=difference)
        )
    if isinstance(difference, str):
        doubts.append(Evidence.of("replica-other-tensor", replica=rank))
    elif difference is not None and stage in _REACHED_DIRECTLY and difference.differing_bits > MOST_FLIPPED_BITS:
        doubts.append(Evidence.of("many-bits-changed", replica=rank, bits=difference.differing_bits))
    return lines, doubts


def compare_outputs(decision: Decision, replayer: Repeats, indices: Tensor, channel: Channel) -> Decision:
    """Run the operator in question once more on both sides, and compare the results.

    For a presumed persistent fault, the operator is also run in float64 to find the side that is wrong.

    Args:
        decision: The decision so far, which names the operator and the two sides.
        replayer: Replays the step.
        indices: Sample indices of the step, shape (batch,), int64.
        channel: The control channel between all replicas.

    Returns:
        The decision with more evidence, and the suspects that the float64 run has found.

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

        return add(decision, channel.gather(attempt(channel, describe))[replica_id])
    if decision.sides is None:
        return decision
    takes_part = channel.rank in decision.sides
    captured = attempt(channel, lambda: replayer.again(indices, place.index).tracer.captured if takes_part else None)
    outputs = channel.gather(captured.outputs if captured else None)
    decision = add(decision, [_describe_outputs(*(outputs[side] for side in decision.sides))])
    return _settle(decision, captured, outputs, channel) if decision.cause == "persistent-fault" else decision


def _settle(decision: Decision, captured: Captured | None, outputs: Sequence[Any], channel: Channel) -> Decision:
    """Run the operator in float64 on each side, and make the side that is wrong the suspect, majority or not."""
    assert decision.sides is not None
    sides = decision.sides

    def judge() -> Arbitration | None:
        return None if captured is None else arbitrate(captured, [outputs[side] for side in sides], sides)

    try:
        rows = channel.gather(attempt(channel, judge))
    except AttemptFailed as error:
        return _unsettled(add(decision, [Evidence.of("float64-failed", error=error)]))
    judges = {replica_id: row for replica_id, row in enumerate(rows) if row is not None}
    if not judges:
        return _unsettled(add(decision, [Evidence.of("float64-no-bound")]))
    trusted = {replica_id: row for replica_id, row in judges.items() if row.trusted}
    lines = [Evidence.of("float64-not-trusted", replica=replica_id) for replica_id in judges.keys() - trusted.keys()]
    heard = next(iter(trusted.values()), None)
    if heard is None or any(row.possible != heard.possible for row in trusted.values()):
        lines.append(Evidence.of("float64-disagrees"))
        return _unsettled(add(decision, lines))
    decision = add(decision, [*lines, *heard.evidence])
    wrong = [side for side, possible in zip(sides, heard.possible, strict=True) if not possible]
    if len(wrong) == 1:
        (whole_group,) = (ids for ids in decision.groups or [wrong] if wrong[0] in ids)
        return replace(decision, suspects=whole_group, settled=True)
    line = Evidence.of("float64-neither-possible" if wrong else "float64-both-possible")
    return add(decision, [line], cause="unexplained", both_possible=not wrong)


def _unsettled(decision: Decision) -> Decision:
    """Keep the suspects of the majority vote. Without any, the cause is unexplained."""
    return decision if decision.suspects else replace(decision, cause="unexplained")


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
