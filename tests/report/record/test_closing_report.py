"""The closing report on the terminal."""

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from dreplica.agreement.trace.report_records import EpochRecord, ReplicaInfo, RunInfo
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.report.record.closing_report import print_report, shortened


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


def long_report(num_replicas: int, num_epochs: int, suspects: list[int]) -> RunReport:
    rows = [ReplicaInfo(replica=index, host=f"host{index}", device="cpu", seed=1) for index in range(num_replicas)]
    report = RunReport(run=RunInfo(name="run", folder="run"), replicas=rows)
    for epoch in range(1, num_epochs + 1):
        values = {"loss": [0.25 + index for index in range(num_replicas)], "accuracy": [0.5] * num_replicas}
        report.epochs.append(EpochRecord.of(epoch, values, values, 1.5))
    report.warnings = [f"warning number {number}" for number in range(30)]
    report.conclude(Verdict(False, "unexplained", "diverged", suspects=suspects))
    return report


def test_long_tables_and_lists_are_shortened() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_report(console, long_report(1000, 200, [500, 501]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) <= 80
    for shown in ("host0 ", "host500 ", "host501 ", "host999 ", "…", "20 more warnings in report.json"):
        assert shown in text, shown
    assert "host499 " not in text
    assert "0.250-999" in text


def test_short_tables_are_whole() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_report(console, long_report(3, 16, []))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert text.count("0.250-2.250") == 32


@pytest.mark.parametrize(
    ("count", "wanted", "shown"),
    [
        (3, [], [0, 1, 2]),
        (16, [], list(range(16))),
        (17, [], [*range(8), None, *range(9, 17)]),
        (40, [20], [*range(8), None, 20, None, *range(32, 40)]),
        (40, [8, 31], [*range(9), None, *range(31, 40)]),
        (40, [0, 39], [*range(8), None, *range(32, 40)]),
        (1000, range(100, 900), [*range(8), None, *range(100, 116), None, *range(992, 1000)]),
    ],
)
def test_shortened_keeps_both_ends_and_wanted(count: int, wanted: list[int], shown: list[int | None]) -> None:
    assert list(shortened(count, wanted)) == shown


def test_verdict_is_logged_for_log_file_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dreplica")
    printed(Verdict(False, "unexplained", "replicas diverged", step=3))
    assert [record.getMessage() for record in caplog.records][:2] == ["VERDICT replicas diverged", "  where: step 3"]
    assert all(record.on_stdout for record in caplog.records)  # type: ignore[attr-defined]


def test_announced_warnings_are_not_repeated() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_report(console, long_report(2, 1, []), announced=["warning number 0", "warning number 2"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [number for number in range(4) if f"warning number {number}\n" in text] == [1, 3]
