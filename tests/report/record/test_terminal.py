"""What is printed at the end of a run."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.report.record.run_report import RunReport
from dreplica.report.record.terminal import print_report


def printed(verdict: Verdict, **replica: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    row = {"host": "a", "device": "cpu", "seed": 1} | replica
    print_report(console, RunReport("run", Path("run"), "identical", [row], verdict=verdict))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_not_known_is_not_printed() -> None:
    text = printed(Verdict(False, "config-differs", "another lr"), host=None, device=None, seed=None)
    assert "where:" not in text
    assert "None" not in text
    text = printed(Verdict(False, "unexplained", "parted", step=3, module="", operator="aten.mul.Tensor"))
    assert "  where: step 3, operator aten.mul.Tensor\n" in text
