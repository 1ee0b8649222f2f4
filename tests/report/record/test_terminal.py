"""The closing report on the terminal."""

import io
from typing import Any

from rich.console import Console

from dreplica.agreement.trace.report_records import ReplicaInfo, RunInfo
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.report.record.terminal import print_report


def printed(verdict: Verdict, **replica: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    row = ReplicaInfo(**{"replica": 0, "host": "a", "device": "cpu", "seed": 1} | replica)
    report = RunReport(run=RunInfo(name="run", folder="run"), replicas=[row])
    report.conclude(verdict)
    print_report(console, report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_unknown_facts_are_not_printed() -> None:
    text = printed(Verdict(False, "config-differs", "another lr"), host=None, device=None, seed=None)
    assert "where:" not in text
    assert "None" not in text
    text = printed(Verdict(False, "unexplained", "diverged", step=3, module="", operator="aten.mul.Tensor"))
    assert "  where: step 3, operator aten.mul.Tensor\n" in text
