"""Looks at tensors themselves, element by element, where digests have led to a cause: to show it, and to doubt it."""

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
"""As many may flip anywhere at once; more of them only if they lie scattered over a tensor."""
_FEW_BITS_OF_A_NUMBER = 4
"""Of a number with a fraction that alone has changed: to give it another value changes about half of its mantissa."""
_MOST_STRUCK_TENSORS = 2
"""Of one stage: a fault of memory reaches one, or two that lie side by side."""
_REACHED_DIRECTLY = {"optimizer", "weights"}
"""Stages in which a fault first shows as itself; those before them show what a forward or backward pass made of it."""


def add(decision: Decision, lines: Sequence[Evidence], **changes: Any) -> Decision:
    """Return a decision with more evidence.

    Args:
        decision: The decision so far.
        lines: The evidence to append.
        **changes: Fields of the decision to change.
    """
    return replace(decision, evidence=[*decision.evidence, *lines], **changes)


def doubt_corruption(decision: Decision, replayer: Repeats, indices: Tensor, channel: Channel) -> Decision:
    """Looks at memory that seems to have changed by itself: a fault flips few bits. A collective.

    Where many differ, something has written there that is no operator of torch's: NumPy, or a C extension. Where the
    sound side is one number throughout, that it seemed accounted for may be chance: zeros are alike everywhere.
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
    for sound, other in pairs:
        difference = compare(sound, other)
        if difference is None:
            continue
        lines.append(Evidence.of("elements-differ", difference=difference))
        if isinstance(difference, str):
            doubts.append(Evidence.of("other-tensor"))
        elif was_written(difference):
            bits, elements = difference.differing_bits, difference.num_differing
            doubts.append(Evidence.of("memory-overwritten", bits=bits, elements=elements))
        elif corrupted.index is not None and bool((sound == sound.flatten()[0]).all()):
            doubts.append(Evidence.of("memory-constant"))
    decision = add(decision, [*lines, *doubts])
    # Who wrote there last is then not known: it was no operator.
    return replace(decision, cause="unexplained", operator=None) if doubts or not lines else decision


def was_written(difference: Difference) -> bool:
    """Whether more has changed than what faults of memory flip: few bits, or some more that lie scattered.

    A single number that was given another value by code differs in about half of its mantissa's bits. A whole number
    may be a counter, of which all bits but a few are zero, so any few of them may have flipped as well.
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
    """Looks at what a transient fault has changed, as far as it is still there, against the replay. A collective.

    `original`, `again`: this replica's stages at that step, as compared and as replayed.
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
    """On a suspect: how its tensor differs from the replay's, and what of that is not as a fault of memory does it."""
    lines, doubts = [], []
    happened, replayed = original.entries(), again.entries()
    moved = [name for name in happened if happened[name] != replayed.get(name)]
    if stage in _REACHED_DIRECTLY and len(moved) > _MOST_STRUCK_TENSORS:
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
    """Runs the operator in question once more where it matters, and compares the two results. A collective.

    Of what seems a persistent fault, it also tells which side is wrong, if one is.
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
    """The operator run in float64 tells which side is wrong, majority or not; each side runs it by itself."""
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
    """Then the vote stands; without one, nobody is known to be wrong."""
    return decision if decision.suspects else replace(decision, cause="unexplained")


def compare(one: Tensor, other: Tensor) -> Difference | str | None:
    """How two tensors differ, also if they are not of one shape and dtype; None if they do not."""
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
