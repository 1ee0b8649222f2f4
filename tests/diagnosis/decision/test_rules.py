"""The rules name a cause from findings: what one replica has found counts, what all have found does not."""

from dataclasses import replace

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from tests.diagnosis.decision.test_decide import bad, decide, witness
from tests.messages import codes

DRAWN = Finding(Kind.DRAWN_FURTHER, [Evidence.of("generator-drawn-differently", replica=1)])


def test_decide_merges_findings_of_suspects() -> None:
    sides = [witness(), witness(original=bad("weights"), findings=[DRAWN]), witness()]
    decision = decide(sides, {}, [])
    assert (decision.cause, decision.suspects) == ("generators-differ", [1])
    assert "generator-drawn-differently" in codes(decision.evidence)
    assert {finding.kind: list(finding.replicas) for finding in decision.findings}[Kind.DRAWN_FURTHER] == [1]


def test_decide_ignores_findings_of_all_or_of_others() -> None:
    sides = [witness(), witness(original=bad("weights")), witness()]
    for having in ((0,), (0, 1, 2)):
        rows = [replace(row, findings=[DRAWN]) if r in having else row for r, row in enumerate(sides)]
        assert decide(rows, {}, []).cause == "transient-fault"
