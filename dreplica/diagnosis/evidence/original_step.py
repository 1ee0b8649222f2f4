"""Traces that code leaves in a step which its replay does not repeat, and the size of the difference.

A version counter, the number of autograd nodes, attributes and the position of a generator only move where code runs. A
fault of memory changes bits of one tensor and moves none of them. All functions are pure.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.aftermath import Aftermath, Change, compare_tensors
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import FEW_BITS, MOST_FLIPPED_BITS
from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.draws import MOST_DRAWS, draws_apart

_MOST_TENSORS = 2
"""Number of tensors of a stage that one fault of memory reaches: one, or two that are adjacent."""
_MOST_NAMED = 3
"""Tensors or attributes named in a line of evidence."""
_READS = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")
"""Operators that give values of tensors to Python, whose next steps may depend on them."""


def find_traces(original: Aftermath, replayed: Aftermath, replica_id: int) -> list[Finding]:
    """Find what only code moves, and the original step moved further or less far than its replay.

    Args:
        original: The original step.
        replayed: Its replay, run without a tracer.
        replica_id: The replica.
    """
    findings = [*_other_writes(original, replayed, replica_id), *find_draws(original, replayed, replica_id)]
    if original.nodes is not None and replayed.nodes is not None and original.nodes != replayed.nodes:
        counts = {"original": original.nodes, "replayed": replayed.nodes}
        findings.append(_finding(Kind.OTHER_GRAPH, "original-step-graph", replica_id, **counts))
    if original.values and replayed.values:
        moved = _other_values(original, replayed)
        if moved:
            data = {"names": _some([*moved]), "some": _some([*moved.values()])}
            findings.append(_finding(Kind.ATTRIBUTES_MOVED, "original-step-attributes", replica_id, **data))
    return findings


def find_draws(original: Aftermath, replayed: Aftermath, replica_id: int) -> list[Finding]:
    """Find generators that one run of a step drew from further than the other.

    Args:
        original: The original step.
        replayed: Its replay.
        replica_id: The replica.
    """
    findings = []
    for one, other in (
        (replayed.generators, original.generators),
        (replayed.own_generators, original.own_generators),
    ):
        for name, count in draws_apart(one, other).items():
            data = {"generator": name, "draws": abs(count), "direction": "less far" if count < 0 else "further"}
            findings.append(_finding(Kind.DRAWN_FURTHER, "original-step-drew", replica_id, **data))
    return findings


def find_counters(original: Aftermath, replayed: Aftermath, replica_id: int) -> list[Finding]:
    """Find integer buffers that moved by a count, unless a few flipped bits explain all that differs in buffers.

    Args:
        original: The original step.
        replayed: Its replay.
        replica_id: The replica.
    """
    buffers = [side.tensors.get("buffers", {}) for side in (original, replayed)]
    changed = compare_tensors(*buffers)
    few = [each for each in changed.values() if isinstance(each, Difference) and each.differing_bits <= FEW_BITS]
    if len(few) == len(changed) <= 1:
        return []
    moved = {
        name: f"{name} ({difference.first_values[0]} and {difference.first_values[1]})"
        for name, difference in changed.items()
        if isinstance(difference, Difference)
        and _is_counter(buffers[0][name])
        and difference.max_absolute is not None
        and difference.max_absolute <= MOST_DRAWS
    }
    if not moved:
        return []
    data = {"names": _some([*moved]), "some": _some([*moved.values()])}
    return [_finding(Kind.COUNTER_MOVED, "original-step-counted", replica_id, **data)]


def find_skipped_step(original: Aftermath, replayed: Aftermath, before: Aftermath, replica_id: int) -> list[Finding]:
    """Find that the original step left the weights unchanged, where its replay changes them.

    Args:
        original: The original step.
        replayed: Its replay.
        before: The state before the step.
        replica_id: The replica.
    """
    weights = [side.tensors.get("weights", {}) for side in (original, replayed, before)]
    stepped = [name for name in weights[2] if not _same(weights[1].get(name), weights[2][name])]
    if not stepped or not all(_same(weights[0].get(name), weights[2][name]) for name in stepped):
        return []
    return [_finding(Kind.NOT_STEPPED, "original-step-skipped", replica_id, count=len(stepped))]


def find_size(change: Change, spreads: bool, proof: str | None, replica_id: int) -> list[Finding]:
    """Find whether a change is small enough for a fault of memory, or too large.

    Args:
        change: What differs in the first stage that does.
        spreads: True if a fault elsewhere may have spread over this stage, so that a large change shows nothing.
        proof: Why this is known to be the whole difference of the step. None if it is not.
        replica_id: The replica.
    """
    bits, count = change.bits, len(change.names)
    if not change.differences and (spreads or count <= _MOST_TENSORS):
        line = Evidence.of("original-tensor-gone", replica=replica_id, stage=change.stage)
        return [Finding(Kind.ORIGINAL_GONE, [line], [replica_id])]
    named = [f"{name}: {difference}" for name, difference in change.differences.items()] or change.names
    line = Evidence.of(
        "original-elements-differ",
        replica=replica_id,
        count=count,
        total=change.total,
        stage=change.stage,
        elements=change.elements,
        bits=bits,
        names=_some(change.names),
        some=named[0],
    )
    if count == 1 and bits is not None and bits <= FEW_BITS and proof is not None:
        whole = Evidence.of("original-whole-difference", replica=replica_id, proof=proof)
        return [Finding(Kind.FEW_BITS, [line, whole], [replica_id])]
    if change.reshaped:
        return [Finding(Kind.MANY_BITS, [line], [replica_id])]
    if not spreads and count > _MOST_TENSORS:
        return [Finding(Kind.MANY_TENSORS, [line], [replica_id])]
    if not spreads and bits is not None and bits > MOST_FLIPPED_BITS:
        return [Finding(Kind.MANY_BITS, [line], [replica_id])]
    return [Finding(Kind.SPREAD, [line, Evidence.of("original-spread", replica=replica_id)], [replica_id])]


def find_generator_size(original: Aftermath, replayed: Aftermath, replica_id: int) -> list[Finding]:
    """Find whether a few bits of one generator's state differ, where nothing but generators does.

    Args:
        original: The original step.
        replayed: Its replay.
        replica_id: The replica.
    """
    bits = {}
    for name in original.generators.keys() & replayed.generators.keys():
        one, other = (_bytes(side.generators[name]) for side in (original, replayed))
        if one != other:
            same_size = len(one) == len(other)
            bits[name] = (
                sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True)) if same_size else 8 * len(one)
            )
    if not bits:
        line = Evidence.of("original-tensor-gone", replica=replica_id, stage="rng")
        return [Finding(Kind.ORIGINAL_GONE, [line], [replica_id])]
    some = _some([f"{name} in {count} bits" for name, count in bits.items()])
    line = Evidence.of("original-generators-differ", replica=replica_id, bits=sum(bits.values()), some=some)
    if len(bits) == 1 and sum(bits.values()) <= FEW_BITS:
        whole = Evidence.of("original-whole-difference", replica=replica_id, proof="everything else agrees")
        return [Finding(Kind.FEW_BITS, [line, whole], [replica_id])]
    kind = Kind.MANY_BITS if sum(bits.values()) > MOST_FLIPPED_BITS else Kind.SPREAD
    return [Finding(kind, [line], [replica_id])]


def find_overwritten(original: Aftermath, optimized: Aftermath, replica_id: int) -> list[Finding]:
    """Find that many elements of weights are not what the optimizer makes of the gradients.

    Args:
        original: The original step.
        optimized: The state after the optimizer's step alone, with the gradients of the original step.
        replica_id: The replica.
    """
    changed = compare_tensors(original.tensors["weights"], optimized.tensors["weights"])
    elements = sum(each.num_differing for each in changed.values() if isinstance(each, Difference))
    if elements <= FEW_BITS and len(changed) <= _MOST_TENSORS:
        return []
    data = {"elements": elements, "some": _some([*changed])}
    return [_finding(Kind.OUTSIDE_OPTIMIZER, "original-step-overwrote", replica_id, **data)]


def reads_values(records: Sequence[OpRecord]) -> bool:
    """Return True if the step's code reads values of tensors into Python, so that its next steps may depend on them."""
    return any(record.source and record.name.startswith(_READS) for record in records)


def _other_writes(original: Aftermath, replayed: Aftermath, replica_id: int) -> list[Finding]:
    names = [name for name in original.writes if name in replayed.writes]
    moved = [name for name in names if original.writes[name] != replayed.writes[name]]
    if not moved:
        return []
    some = _some([f"{name} ({original.writes[name]} and {replayed.writes[name]} times)" for name in moved])
    return [_finding(Kind.WRITTEN_BY_CODE, "original-step-wrote", replica_id, names=_some(moved), some=some)]


def _other_values(original: Aftermath, replayed: Aftermath) -> dict[str, str]:
    found = {}
    for name in sorted(original.values.keys() | replayed.values.keys()):
        one, other = (repr(side.values[name]) if name in side.values else "missing" for side in (original, replayed))
        if one != other:
            found[name] = f"{name} ({one} and {other})"
    return found


def _finding(kind: Kind, code: str, replica_id: int, **data: object) -> Finding:
    return Finding(kind, [Evidence.of(code, replica=replica_id, **data)], [replica_id])


def _some(names: Sequence[str]) -> list[str]:
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return [*islice(names, _MOST_NAMED), *more]


def _is_counter(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool


def _same(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return compare_elements(one.cpu(), other.cpu()) is None


def _bytes(state: Tensor | bytes | None) -> bytes:
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else state or b""
