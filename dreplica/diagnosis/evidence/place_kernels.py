"""Kernels, modes and replaced functions that divide the replicas exactly as their results do."""

from collections.abc import Sequence

import torch

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import OpDifference, Witness
from dreplica.diagnosis.tracing.foreign_code import ForeignCode

_MOST_NAMED = 3
"""Lines of evidence on one divergence."""


def kernels_at(place: OpDifference, witnesses: Sequence[Witness], groups: Sequence[Sequence[int]]) -> list[Finding]:
    """Report code in place of torch's own that can have acted at a place, and divides the replicas as it does.

    Args:
        place: The first operator that differs.
        witnesses: The observations of each replica, by replica id.
        groups: The replicas grouped by equal results.
    """
    rows = [witness.foreign.code for witness in witnesses]
    lines = []
    for what in sorted(set().union(*rows)):
        found = [row.get(what) for row in rows]
        origins = [None if each is None else each.origin for each in found]
        if not _divides(origins, groups) or not any(each is not None and _acts(each, place) for each in found):
            continue
        places = "; ".join(f"{origin or 'as in torch'} on replica {r}" for r, origin in enumerate(origins))
        lines.append(Evidence.of("kernel-differs", what=what, places=places, origins=origins))
    return [Finding(Kind.KERNELS_DIVIDE, lines[:_MOST_NAMED])] if lines else []


def _divides(values: Sequence[str | None], groups: Sequence[Sequence[int]]) -> bool:
    within = [{values[replica_id] for replica_id in ids} for ids in groups]
    return all(len(each) == 1 for each in within) and len(set().union(*within)) == len(groups)


def _acts(code: ForeignCode, place: OpDifference) -> bool:
    """Return True if code can have acted at a place: on its operator, or as what called it. A mode acts on any."""
    records = [record for record in (place.one, place.other, place.extra) if record is not None]
    if code.operator is not None:
        return any(record.name == code.operator for record in records) or _is_composite(code.operator)
    if code.module is not None and any(record.module == code.module for record in records):
        return True
    if not code.file:
        return True
    calls = (record.source.rpartition(":") for record in records)
    return any(
        file == code.file and code.lines[0] <= int(line or 0) <= code.lines[1] for file, _, line in calls if file
    )


def _is_composite(operator: str) -> bool:
    """Return True for an operator that consists of others, which are seen in its place."""
    packet, _, overload = operator.rpartition(".")
    qualified = packet.replace(".", "::", 1) + ("" if overload == "default" else f".{overload}")
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeImplicitAutograd")
    except RuntimeError:  # an operator that this replica does not have
        return True
