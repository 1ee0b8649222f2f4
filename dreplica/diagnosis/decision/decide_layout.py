"""Findings that the layouts of replicas' states show: other tensors, another order of parameters, other modes."""

from collections.abc import Sequence
from dataclasses import replace

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import module_of
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, OpDifference, Witness, could_have_made, with_findings
from dreplica.diagnosis.evidence.provenance import DIGEST_BYTES
from dreplica.diagnosis.replay.state_layout import LayoutDifferences, Structure
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.stages import STAGES

_BEFORE_THE_MODEL = ("indices", "batch")


def structure_verdict(structure: Structure, found: Verdict | None) -> Verdict:
    """Return the verdict on replicas whose states cannot be made equal.

    Args:
        structure: The first difference in structure.
        found: The verdict of the divergence to explain, if there is one.
    """
    groups = split_into_groups([repr(value).encode() for value in structure.values])
    where = ", ".join(part for part in (structure.stage, structure.tensor) if part)
    evidence = [structure.evidence]
    if not suspects_of(groups):
        evidence.append(Evidence.of("no-majority", num_replicas=len(structure.values)))
    verdict = Verdict(
        False,
        structure.cause,
        f"replicas do not hold the same kind of state: {where}; groups {groups}",
        step=None if found is None else found.step,
        epoch=None if found is None else found.epoch,
        stage=structure.stage,
        tensor=structure.tensor,
        module=module_of(structure.stage, structure.tensor),
        suspects=suspects_of(groups),
        groups=groups,
        evidence=evidence,
    )
    if found is None or found.stage not in _BEFORE_THE_MODEL:
        return verdict
    line = Evidence.of("stage-not-explained", stage=found.stage)
    return found.with_(cause="unexplained", remedy=[], evidence=[*found.evidence, structure.evidence, line])


def explained_by_order(found: Verdict | None) -> bool:
    """Return True if the order alone explains a divergence: the entries of a stage differ in nothing else."""
    return found is None or (found.stage is not None and found.tensor is None)


def find_layout(
    decision: Decision,
    witnesses: Sequence[Witness],
    layouts: LayoutDifferences,
    stage: str | None,
    found: Verdict | None,
) -> Decision:
    """Add findings on the order of parameters and the modes of modules, where they differ.

    Args:
        decision: The decision from the replays alone.
        witnesses: The observations of each replica, by replica id.
        layouts: The differences between the replicas' layouts.
        stage: The first stage in which replays differ between replicas, or None.
        found: The verdict of the divergence to explain, if there is one.

    Returns:
        The decision, with a finding for each difference.
    """
    lines = [line for line in (layouts.order, layouts.modes) if line is not None]
    if not lines:
        return decision
    decision = with_findings(decision, Finding(Kind.DIFFERS_TOO, lines))
    if any(row.first != row.second for row in witnesses):
        return decision
    place = _order_behind_all(witnesses, stage) if layouts.order is not None else None
    if place is not None and (explained_by_order(found) or _is_explained(found, place.record, stage)):
        line = Evidence.of("operator-order", index=place.index, operator=place.record)
        kept = [item for item in decision.evidence if item.code != "operator-inputs-differ"]
        return with_findings(replace(decision, evidence=kept), Finding(Kind.OTHER_ORDER, [line]), operator=place)
    modules = layouts.modes.data["modules"] if layouts.modes is not None else ()
    operator = decision.operator
    if operator and (operator.record.module or "the model") in modules:
        return with_findings(decision, Finding(Kind.MODES_DIVIDE))
    return decision


def _is_explained(found: Verdict | None, record: OpRecord, stage: str | None) -> bool:
    """Return True if a difference made by this operator can show first in the stage that had diverged."""
    if found is None or found.stage not in STAGES:
        return True
    later = stage is not None and STAGES.index(stage) > STAGES.index(found.stage)
    return not later and could_have_made(record, found.stage)


def _order_behind_all(witnesses: Sequence[Witness], stage: str | None) -> OpDifference | None:
    """Return the operator whose inputs' order parts the replicas, if that holds between any two groups of them."""
    groups = split_into_groups([row.first.get(stage or "", b"") for row in witnesses])
    first, *others = (witnesses[ids[0]].records for ids in groups)
    places = [order_behind(first, other) for other in others]
    return places[0] if places and None not in places else None


def order_behind(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> OpDifference | None:
    """Return the first operator that gives another result because it got the same tensors in another order.

    Operators are matched by what they read, not by their position. An operator that gives the same results, in another
    order, makes no difference.

    Args:
        one: The operators of one run.
        other: The operators of the other run.

    Returns:
        The operator. None if the runs first differ in something else.
    """
    exact: dict[tuple[str, str, bytes, bytes], set[bytes]] = {}
    by_content: dict[tuple[str, str, bytes, bytes], list[OpRecord]] = {}
    for record in other:
        call = record.name, record.scalars, record.generator
        exact.setdefault((*call, record.inputs), set()).add(record.outputs)
        by_content.setdefault((*call, _sorted(record.inputs)), []).append(record)
    for index, record in enumerate(one):
        call = record.name, record.scalars, record.generator
        outputs = exact.get((*call, record.inputs))
        if outputs is not None:
            if record.outputs not in outputs:
                return None  # the operator itself made the difference
            continue
        matches = by_content.get((*call, _sorted(record.inputs)), [])
        if not matches:
            return None
        if all(_sorted(match.outputs) != _sorted(record.outputs) for match in matches):
            return OpDifference(index, record, matches[0])
    return None


def _sorted(digests: bytes) -> bytes:
    return b"".join(sorted(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)))
