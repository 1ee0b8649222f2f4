"""The path of a difference: from the first operator that differs to the outputs, how far apart the results are."""

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
    """How far the results of two runs of the step are apart, operator by operator. A collective.

    From the first operator whose results differ to the last one of its phase: to the loss, to the gradients, or to the
    updated weights.

    Args:
        decision: names that operator, and which replicas to compare, or the one to compare with itself.
        records: each replica's operators in the first replay.
        second: this replica's in the second.
        replayer, indices: to run the step again.
        channel: between all replicas.

    Returns `replicas` (the two compared), `num_operators` (how many differ) and `operators`: of these, or of evenly
    spaced ones with the first and the last where there are many, `index` (in the step), `operator`, `module`, `phase`,
    `max_ulp`, `max_absolute` and `relative` (to the largest magnitude in either result), the largest over
    floating-point results (None where a NaN is involved), `num_differing` and `num_compared` (elements), and
    `num_elements` (all there are). Empty where there is no such operator, or the step could not be run again.
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
            gathered = channel.gather(mine)  # one operator at a time: memory for the results of all is not needed
            pair = gathered[one] if one == other else [*gathered[one], *gathered[other]]
            if _kinds(pair[0]) != _kinds(pair[1]):
                break  # from here on they compute other things
            record = records[one][index]
            named = {"index": index, "operator": record.name, "module": record.module, "phase": record.phase}
            rows.append(named | _distance(*pair))
    except AttemptFailed:
        return {}  # the verdict stands without it
    return {"replicas": [one, other], "num_operators": len(differing), "operators": rows} if rows else {}


def _sides(decision: Decision) -> tuple[int, int] | None:
    """Two replicas on the two sides of the difference; twice the same one where it differs from itself."""
    if decision.replica_against_itself is not None:
        return decision.replica_against_itself, decision.replica_against_itself
    if decision.sides is not None or decision.groups is None or len(decision.groups) < 2:
        return decision.sides
    one, other = sorted((decision.groups[0][0], decision.groups[1][0]))
    return one, other


def _differing(one: Sequence[OpRecord], other: Sequence[OpRecord], start: int) -> list[int]:
    """The operators from `start` on, in the same phase, whose results differ, as far as both runs take one course."""
    found: list[int] = []
    for index, (a, b) in enumerate(zip(one[start:], other[start:], strict=False), start):
        if not a.same_operator(b) or a.phase != one[start].phase:
            break
        if a.outputs != b.outputs:
            found.append(index)
    return found


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spaced, the first and the last among them; of one, the last."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _kinds(samples: Sequence[tuple[Tensor, int]]) -> list[tuple[torch.dtype, int]]:
    return [(sample.dtype, count) for sample, count in samples]


def _distance(one: Sequence[tuple[Tensor, int]], other: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
    """Over all results of an operator."""
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
