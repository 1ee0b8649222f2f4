"""Measurement of a difference from the first operator that differs to the end of its phase."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dreplica.diagnosis.evidence.observation import Decision
from dreplica.diagnosis.evidence.tensor_diff import compare_elements
from dreplica.diagnosis.replay.replay_run import Replayer
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.diagnosis.tracing.output_sampler import OutputSampler
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel

T = TypeVar("T")

_MOST_OPERATORS = 48


def measure_path(
    decision: Decision,
    records: Sequence[Sequence[OpRecord]],
    second: Sequence[OpRecord],
    replayer: Replayer,
    indices: Tensor,
    channel: Channel,
) -> dict[str, Any]:
    """Measure how far apart the results of two replays are, operator by operator.

    The path begins at the first operator whose results differ. It ends with the last one of the phase: at the loss, the
    gradients, or the updated weights.

    Args:
        decision: Names the operator, and the two replicas to compare or the one to compare with itself.
        records: Each replica's operators in the first replay.
        second: This replica's operators in the second replay.
        replayer: Replays the step.
        indices: Sample indices of the step, shape (batch,), int64.
        channel: The control channel between all replicas.

    Returns:
        A dict with `replicas` (the two compared), `num_operators` (the number that differ) and `operators`. If there
        are many operators, evenly spaced ones are listed, with the first and the last. Each has `index` (position in
        the step), `operator`, `module`, `phase`; `max_ulp`, `max_absolute` and `relative` (to the largest magnitude of
        either result), which are maxima over floating-point results, or None if NaN is involved; `num_differing` and
        `num_compared` (elements), and `num_elements` (all elements). Empty if there is no such operator, or if the step
        cannot be replayed.

    Note:
        Collective: call on every rank.
    """
    place = decision.operator
    sides = None if place is None or not place.same_structure else _sides(decision)
    if place is None or sides is None:
        return {}
    one, other = sides
    across = records[one], second if one == other else records[other]
    differing = channel.gather(_differing(*across, place.index))[one]
    chosen = evenly(differing, _MOST_OPERATORS)
    takes_part = channel.rank in sides and bool(chosen)

    def sample(times: int) -> list[dict[int, list[tuple[Tensor, int]]]]:
        tracers = [replayer.again(indices, sampled=chosen).tracer for _ in range(times if takes_part else 0)]
        return [tracer.samples for tracer in tracers if isinstance(tracer, OutputSampler)]

    try:
        own = attempt(channel, lambda: sample(2 if one == other else 1))
        rows = []
        for index in chosen:
            mine = [samples.get(index, []) for samples in own]
            gathered = channel.gather(mine)  # one operator at a time, to limit memory
            pair = gathered[one] if one == other else [*gathered[one], *gathered[other]]
            if _kinds(pair[0]) != _kinds(pair[1]):
                break  # from here on the two replays compute different things
            record = records[one][index]
            named = {"index": index, "operator": record.name, "module": record.module, "phase": record.phase}
            rows.append(named | _distance(*pair))
    except AttemptFailed:
        return {}  # the verdict does not depend on it
    return {"replicas": [one, other], "num_operators": len(differing), "operators": rows} if rows else {}


def _sides(decision: Decision) -> tuple[int, int] | None:
    """Return two replicas whose results differ, or the same one twice if it differs from itself."""
    if decision.replica_against_itself is not None:
        return decision.replica_against_itself, decision.replica_against_itself
    if decision.sides is not None or decision.groups is None or len(decision.groups) < 2:
        return decision.sides
    one, other = sorted((decision.groups[0][0], decision.groups[1][0]))
    return one, other


def _differing(one: Sequence[OpRecord], other: Sequence[OpRecord], start: int) -> list[int]:
    """Return operators of the phase from `start` on whose results differ, while both replays run the same operators."""
    found: list[int] = []
    for index, (a, b) in enumerate(zip(one[start:], other[start:], strict=False), start):
        if not a.same_operator(b) or a.phase != one[start].phase:
            break
        if a.outputs != b.outputs:
            found.append(index)
    return found


def evenly(values: Sequence[T], most: int) -> list[T]:
    """Return at most `most` evenly spaced values, with the first and the last. If `most` is 1, return the last."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _kinds(samples: Sequence[tuple[Tensor, int]]) -> list[tuple[torch.dtype, int]]:
    return [(sample.dtype, count) for sample, count in samples]


def _distance(one: Sequence[tuple[Tensor, int]], other: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
    """Return the maximum distance over all results of an operator."""
    ulps: list[int | None] = [0]
    absolutes: list[float | None] = [0.0]
    relatives: list[float | None] = [0.0]
    num_differing = 0
    for (a, _), (b, _) in zip(one, other, strict=True):
        difference = compare_elements(a, b)
        if difference is None:
            continue
        num_differing += difference.num_differing
        ulps.append(difference.max_ulp)
        absolutes.append(difference.max_absolute)
        relatives.append(_relative(difference.max_absolute, a, b))
    return {
        "max_ulp": _largest(ulps),
        "max_absolute": _largest(absolutes),
        "relative": _largest(relatives),
        "num_differing": num_differing,
        "num_compared": sum(len(sample) for sample, _ in one),
        "num_elements": sum(count for _, count in one),
    }


def _relative(absolute: float | None, one: Tensor, other: Tensor) -> float | None:
    if absolute is None:
        return None
    wide = torch.complex128 if one.is_complex() else torch.float64
    magnitude = float(torch.cat([one.to(wide).abs(), other.to(wide).abs()]).max())
    return absolute / magnitude if magnitude else 0.0


def _largest(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else max(values)
