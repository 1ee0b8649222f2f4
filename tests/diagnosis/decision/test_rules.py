"""The rules name a cause from findings: what one replica has found counts, what all have found does not."""

from dataclasses import replace
from itertools import combinations

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.decision.rules import HARDWARE, RULES, Rule, name_cause
from dreplica.diagnosis.evidence.finding import Finding, Kind
from tests.diagnosis.decision.test_decide import bad, decide, witness
from tests.messages import codes

DRAWN = Finding(Kind.DRAWN_FURTHER, [Evidence.of("original-generators-differ", replica=1, bits=90, some="python")])


def test_decide_merges_findings_of_suspects() -> None:
    sides = [witness(), witness(original=bad("weights"), findings=[DRAWN]), witness()]
    decision = decide(sides, {}, [])
    assert (decision.cause, decision.suspects) == ("generators-differ", [1])
    assert "original-generators-differ" in codes(decision.evidence)
    assert {finding.kind: list(finding.replicas) for finding in decision.findings}[Kind.DRAWN_FURTHER] == [1]


def test_decide_ignores_findings_of_all_or_of_others() -> None:
    sides = [witness(), witness(original=bad("weights")), witness()]
    for having in ((0,), (0, 1, 2)):
        rows = [replace(row, findings=[DRAWN]) if r in having else row for r, row in enumerate(sides)]
        assert decide(rows, {}, []).cause == "transient-fault"


# ---- the table


def spell(value: object) -> str:
    return value.cause if isinstance(value, Rule) else " ".join(sorted(value))  # type: ignore[call-overload]


ELSEWHERE = {
    "none": "conclude.agreed",
    "unexplained": "where no rule holds",
    "optimizer-not-bound": "replica.wiring, before the first step",
    "scheduler-not-bound": "replica.wiring, before the first step",
    "parameters-not-optimized": "replica.wiring, before the first step",
    "storage-shared": "replica.wiring, before the first step",
    "not-learning": "learning_check",
    "replica-lost": "lost_replicas",
}
"""Causes that no rule names, with the place that does."""


def test_each_cause_has_a_rule_or_a_place() -> None:
    named = {rule.cause for rule in RULES}
    assert named | set(ELSEWHERE) == set(CAUSES)
    assert not named & set(ELSEWHERE)


def test_each_kind_is_used() -> None:
    """A kind that no rule needs or excludes would have no effect on any cause."""
    used = frozenset().union(*(rule.needs | rule.any_of | rule.excludes for rule in RULES))
    assert set(Kind) == used


MINIMAL = [(rule, rule.needs | {kind}) for rule in RULES for kind in sorted(rule.any_of or rule.needs)]
"""Each rule with the least that fulfils it."""


@pytest.mark.parametrize(("rule", "found"), MINIMAL, ids=spell)
def test_rule_names_its_cause_from_what_it_needs_alone(rule: Rule, found: frozenset[Kind]) -> None:
    assert found
    assert not (rule.needs | rule.any_of) & rule.excludes
    assert name_cause(found) == rule.cause


@pytest.mark.parametrize(("rule", "found"), MINIMAL, ids=spell)
def test_rule_is_void_with_anything_it_excludes(rule: Rule, found: frozenset[Kind]) -> None:
    assert Kind.NOT_EXPLAINED in rule.excludes
    for kind in rule.excludes:
        assert not rule.holds(found | {kind})
        if not any(other.cause == rule.cause and other.holds(found | {kind}) for other in RULES):
            assert name_cause(found | {kind}) != rule.cause, kind


@pytest.mark.parametrize(("rule", "found"), MINIMAL, ids=spell)
def test_rule_is_void_without_anything_it_needs(rule: Rule, found: frozenset[Kind]) -> None:
    for kind in found:
        assert not rule.holds(found - {kind})
        assert name_cause(found - {kind}) not in {rule.cause, *HARDWARE}, kind


def test_hardware_rules_come_last() -> None:
    hardware = [rule.cause in HARDWARE for rule in RULES]
    assert hardware == sorted(hardware)


LEFT_BY_FAULTS = {
    *(Kind.REPLAYS_AGREE, Kind.REPLAYS_REPRODUCE, Kind.ORIGINAL_DIFFERS, Kind.OPERATOR_MADE_IT),
    *(Kind.MEMORY_CHANGED, Kind.FEW_BITS, Kind.PROVED_WRONG),
}


@pytest.mark.parametrize("kind", sorted(set(Kind) - LEFT_BY_FAULTS))
def test_hardware_is_excluded_by_all_else(kind: Kind) -> None:
    """What is not about replays, memory or a result itself points to code, or leaves the cause open."""
    for rule in RULES:
        if rule.cause in HARDWARE:
            assert name_cause(rule.needs | {kind}) not in HARDWARE


def test_no_two_findings_together_accuse_hardware() -> None:
    for pair in combinations(Kind, 2):
        assert name_cause(pair) not in HARDWARE, pair


@pytest.mark.parametrize(("rule", "found"), [row for row in MINIMAL if row[0].cause not in HARDWARE], ids=spell)
def test_cause_of_code_stands_beside_traces_of_hardware(rule: Rule, found: frozenset[Kind]) -> None:
    """Few bits or a wrong result excludes no cause of code: code makes them too."""
    for kind in (Kind.FEW_BITS, Kind.PROVED_WRONG, Kind.MEMORY_CHANGED):
        assert name_cause(found | {kind}) == rule.cause
