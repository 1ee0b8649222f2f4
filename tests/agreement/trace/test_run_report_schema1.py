"""Reports of schema 1, as versions before 0.2 wrote them."""

import json
from pathlib import Path

from dreplica.agreement.trace.run_report import RunReport

SCHEMA_1 = Path(__file__).parents[2] / "report" / "schema1"
"""Runs that version 0.1 recorded."""


def test_schema_1_is_converted_when_read() -> None:
    old = json.loads((SCHEMA_1 / "diverged" / "report.json").read_text())
    report = RunReport.read(SCHEMA_1 / "diverged")
    verdict = report.verdict
    assert verdict is not None
    assert (verdict.cause, verdict.step, verdict.groups) == ("declared-override", 1, [[0], [1]])
    assert [item.text for item in verdict.evidence] == old["verdict"]["evidence"]
    assert {item.code for item in (*verdict.evidence, *verdict.remedy)} == {"text"}
    assert [(item.text, item.command) for item in verdict.remedy] == [
        ("remove the override, or set it for all replicas", None)
    ]
    assert report.divergence is not None
    assert report.divergence.stage_groups == old["divergence"]["stage_classes"]
    for row, record in zip(old["epochs"], report.epochs, strict=True):
        assert {name: record.values("val", name) for name in record.val} == row["val"]
    assert report.run.last_step == old["run"]["last_step"] == 10
    assert report.coverage is None


def test_schema_1_remedy_becomes_command_and_text(tmp_path: Path) -> None:
    lines = ["sudo memtester 4G 3  # tests the host's memory", "--agreement.every 1", "replace the card"]
    verdict = {"agreed": False, "cause": "transient-fault", "summary": "", "remedy": lines}
    (tmp_path / "report.json").write_text(json.dumps({"schema": 1, "run": {"stopped_after": 7}, "verdict": verdict}))
    report = RunReport.read(tmp_path)
    assert report.verdict is not None
    assert [(item.command, item.text) for item in report.verdict.remedy] == [
        ("sudo memtester 4G 3", "tests the host's memory"),
        ("--agreement.every 1", ""),
        (None, "replace the card"),
    ]
    assert report.run.last_step == 7, "the first reports had no last_step"
