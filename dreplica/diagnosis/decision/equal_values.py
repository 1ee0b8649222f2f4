"""Findings from values that make a step agree when they are made equal on all replicas."""

from collections.abc import Sequence

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, Witness, could_have_made, with_findings
from dreplica.diagnosis.replay.own_values import DifferingValue, Section
from dreplica.diagnosis.tracing.op_tracer import OpRecord

_WHAT = {
    Section.GENERATORS: "random number generators",
    Section.SETTINGS: "settings",
    Section.MODES: "modes",
    Section.ATTRIBUTES: "attributes of modules",
    Section.GRADIENTS: "gradients",
}
_MOST_NAMED = 5


def find_equal_values(
    decision: Decision,
    needed: Sequence[DifferingValue],
    witnesses: Sequence[Witness],
    stage: str | None,
    found: Verdict | None,
    is_ddp: bool,
) -> Decision:
    """Add a finding for each kind of value that must be equal for the step to agree.

    Args:
        decision: The decision from the replays with each replica's own values.
        needed: The values that must be equal.
        witnesses: The observations of each replica with its own values, by replica id.
        stage: The first stage in which these replays differ between replicas.
        found: The verdict of the divergence to explain, if there is one.
        is_ddp: True if replicas are the ranks of one data-parallel model.

    Returns:
        The decision, from which the rules name the cause.
    """
    for section in Section:
        values = [each for each in needed if each.section is section]
        if not values:
            continue
        lines = describe_values(values)
        if section is Section.GENERATORS:
            draws = _first_draws(witnesses, stage, found, is_ddp)
            if draws is not None:
                lines.append(draws)
            elif is_ddp:
                lines.append(Evidence.of("draws-by-design"))
                decision = with_findings(decision, Finding(Kind.NOT_EXPLAINED, lines))
                continue
        code = "equal-modes-agree" if section is Section.MODES else "equal-values-agree"
        lines.append(Evidence.of(code, what=what_of(values)))
        decision = with_findings(decision, Finding(_kind_of(section, values), lines))
    return decision


def describe_values(values: Sequence[DifferingValue]) -> list[Evidence]:
    """Return a line for each kind of value, with the values of each replica."""
    lines = []
    for section in Section:
        chosen = [each for each in values if each.section is section]
        if not chosen:
            continue
        more = f"; and {len(chosen) - _MOST_NAMED} more" if len(chosen) > _MOST_NAMED else ""
        some = "; ".join(map(str, chosen[:_MOST_NAMED])) + more
        facts = {each.name: list(each.texts) for each in chosen}
        what = f"{_WHAT[section]} that differ between replicas"
        lines.append(Evidence.of("own-values-differ", what=what, some=some, section=str(section), values=facts))
    return lines


def what_of(values: Sequence[DifferingValue]) -> str:
    """Return values in words, as in `group0.lr`, `torch's generator` or `training mode of 2.drop`."""
    return list_names([_spell_name(each) for each in values])


def _spell_name(value: DifferingValue) -> str:
    is_mode = value.section is Section.MODES and not value.name.endswith(".requires_grad")
    return f"training mode of {value.name}" if is_mode else value.name


def _kind_of(section: Section, values: Sequence[DifferingValue]) -> Kind:
    if section is Section.GENERATORS:
        return Kind.OTHER_DRAW
    if section is Section.SETTINGS:
        return Kind.HYPERPARAMETER_DIVIDES
    if section is Section.GRADIENTS:
        return Kind.DIFFERS_TOO
    switches = section is Section.MODES or all(isinstance(each.shared, bool | None) for each in values)
    return Kind.MODES_DIVIDE if switches else Kind.OTHER_HOST_VALUE


def _first_draws(
    witnesses: Sequence[Witness], stage: str | None, found: Verdict | None, is_ddp: bool
) -> Evidence | None:
    """Return the first draw, on two replicas that differ, from generators in different states."""
    groups = split_into_groups([row.first.get(stage or "", b"") for row in witnesses])
    if len(groups) < 2:
        return None
    sides = sorted((groups[0][0], groups[1][0]))
    wanted = None if found is None else found.stage
    one, other = ([record for record in witnesses[side].records if _may_show(record, wanted, is_ddp)] for side in sides)
    for index in range(max(len(one), len(other))):
        a, b = (row[index] if index < len(row) else None for row in (one, other))
        if a is None or b is None or (a.name, a.source, a.generator) != (b.name, b.source, b.generator):
            texts = [_spell(a), _spell(b)]
            some = f"{texts[0]} on replica {sides[0]}, {texts[1]} on replica {sides[1]}"
            if texts[0] == texts[1]:
                some = f"{texts[0]}, on replicas {sides[0]} and {sides[1]}"
            return Evidence.of("first-draw-differs", some=some, draws=texts, replicas=sides)
    return None


def _may_show(record: OpRecord, stage: str | None, is_ddp: bool) -> bool:
    """Return True for a draw that may have made a difference in a stage.

    The ranks of a data-parallel model average what they draw in the forward pass.
    """
    if not record.generator or (is_ddp and record.phase != "optimizer"):
        return False
    return stage in (None, "rng", "batch", "indices") or could_have_made(record, stage)


def _spell(record: OpRecord | None) -> str:
    if record is None:
        return "no further draw"
    return f"{record} at {record.source}" if record.source else str(record)
