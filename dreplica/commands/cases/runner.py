"""Runs cases, each as a job under torchrun, and compares the verdicts with the expected ones."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_report import ReportError, RunReport
from dreplica.commands.cases.case import Case, find_cases
from dreplica.commands.scratch_folder import fresh_folder
from dreplica.distributed.launch.background import run_in_background
from dreplica.distributed.signals import signals_as_interrupts
from dreplica.errors import ExitCode

_PLACE = ("step", "stage", "tensor", "operator", "suspects")
"""Fields of a verdict that the table shows in addition to its cause."""
_TAIL_LINES = 15
_WIDE = 140
"""Columns of a terminal on which the place of each finding fits into the table, too."""


@dataclass(frozen=True)
class Result:
    """The result of one case."""

    case: Case
    found: Mapping[str, Any]
    """The verdict of report.json and further observations. Empty if there is no report."""
    seconds: float
    problem: str
    """The reason why there is no report, with the end of the run's output. Empty if there is a report."""

    @property
    def mismatches(self) -> list[str]:
        """Names of the expected fields whose values differ."""
        return [name for name, value in self.case.expected.items() if self.found.get(name) != value]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "case": self.case.name,
            "replicas": self.case.num_replicas,
            "expected": dict(self.case.expected),
            "found": dict(self.found) or None,
            "as_expected": not self.mismatches,
            "mismatches": self.mismatches,
            "seconds": round(self.seconds, 1),
            "problem": self.problem or None,
        }


def run_cases(
    names: Sequence[str], as_json: bool = False, keep: Path | None = None, timeout: float = 120.0
) -> ExitCode:
    """Run cases and print a table of their results.

    Args:
        names: The cases to run; all of them if empty.
        as_json: Print a list of results to stdout instead of the table.
        keep: Folder for run folders and logs. By default, a temporary one.
        timeout: Seconds after which a case is ended and counts as failed.

    Returns:
        `AGREED` if all results are as expected, otherwise `FAILED`.

    Raises:
        UsageError: For an unknown name, or a `keep` that cannot be used.
    """
    cases = find_cases(names)
    progress = Console(stderr=True)
    results = []
    with signals_as_interrupts(), fresh_folder(keep, "cases") as root:
        for number, case in enumerate(cases, start=1):
            result = run_case(case, root, timeout)
            results.append(result)
            mark = "[red]not as expected[/]" if result.mismatches else "as expected"
            progress.print(f"{number} of {len(cases)}  {case.name}  {mark}  {result.seconds:.1f} s", highlight=False)
    if as_json:
        print(json.dumps([result.as_dict() for result in results], indent=1))
    else:
        _print(results, Console())
    return ExitCode.FAILED if any(result.mismatches for result in results) else ExitCode.AGREED


def run_case(case: Case, root: Path, timeout: float = 120.0) -> Result:
    """Run one case as a job.

    Args:
        case: The case to run.
        root: Folder for the case's run folder and log.
        timeout: Seconds after which the case is ended.
    """
    started = time.monotonic()
    output, ended = _launch(case, root, timeout)
    seconds = time.monotonic() - started
    folder = root / case.name
    try:
        report = RunReport.read(folder)
    except ReportError as error:
        tail = "\n".join(output.splitlines()[-_TAIL_LINES:])
        reason = "it ended without a report" if error.code == "no-report" else str(error)
        reason = reason if ended else f"it did not end within {timeout:.0f} seconds"
        return Result(case, {}, seconds, f"{reason}:\n{tail}")
    if not ended:
        return Result(case, {}, seconds, f"it wrote a report but did not end within {timeout:.0f} seconds")
    assert report.verdict is not None, "a run that ended has a verdict"
    found = report.verdict.as_dict()
    found |= {name: _OBSERVE[name](report, folder) for name in case.expected if name in _OBSERVE}
    return Result(case, found, seconds, "")


def _launch(case: Case, root: Path, timeout: float) -> tuple[str, bool]:
    """Return the output of the run, and True if it ended in time."""
    arguments = [f"--config={case.path}", f"--run.root={root}", f"--run.name={case.name}", "--run.resume=never"]
    root.mkdir(parents=True, exist_ok=True)
    ended = run_in_background(case.module, arguments, case.num_replicas, root / f"{case.name}.log", timeout)
    return ended.output, ended.code is not None


def _equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _val_accuracy(report: RunReport, _folder: Path) -> str | None:
    epochs = [len(record.val["accuracy"]) == 1 for record in report.epochs]
    if not epochs:
        return None
    return "equal" if all(epochs) else "unequal"


def _weights(report: RunReport, _folder: Path) -> str | None:
    digests = [row.digests["weights"] for row in report.fingerprints]
    if not digests:
        return None
    return "equal" if _equal(digests) else "unequal"


def _orders(_report: RunReport, folder: Path) -> str:
    trace = Trace(folder)
    digests = [digest for line in trace.lines() if (digest := trace.digests(line).get("indices")) is not None]
    return "distinct" if len(set(digests)) == len(digests) else "repeated"


_OBSERVE: Mapping[str, Callable[[RunReport, Path], str | None]] = {
    "val_accuracy": _val_accuracy,
    "weights": _weights,
    "orders": _orders,
}


def _print(results: Sequence[Result], console: Console) -> None:
    table = Table()
    columns = ["case", "expected", "found", "where", "s"]
    if console.width < _WIDE:
        columns.remove("where")
    for column in columns:
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for result in results:
        found = str(result.found["cause"]) if result.found else "no report"
        cells = {
            "case": escape(result.case.name),
            "expected": escape(str(result.case.expected["cause"])),
            "found": f"[red]✗ {escape(found)}[/]" if result.mismatches else f"[green]✓[/] {escape(found)}",
            "where": escape(_where(result)),
            "s": f"{result.seconds:.1f}",
        }
        table.add_row(*(cells[column] for column in columns))
    console.print(table)
    for result in results:
        for name in result.mismatches if result.found else ():
            line = f"{result.case.name}: {name} should be {result.case.expected[name]!r}, is {result.found.get(name)!r}"
            console.print(f"[red]{escape(line)}[/]", highlight=False, soft_wrap=True)
        if result.problem:
            console.print(f"[red]{escape(result.case.name)}: {escape(result.problem)}[/]", highlight=False)
    wrong = sum(bool(result.mismatches) for result in results)
    total = f"{len(results)} case{'s' * (len(results) != 1)}"
    verdict = f"{wrong} of {total} not as expected" if wrong else f"{total}, all as expected"
    console.print(f"{verdict}, {sum(result.seconds for result in results):.0f} s", highlight=False)


def _where(result: Result) -> str:
    """Return the location in the verdict and the observed fields as one line."""
    names = [*_PLACE, *(name for name in result.case.expected if name in _OBSERVE)]
    present = {name: result.found.get(name) for name in names}
    return " ".join(f"{name}={value}" for name, value in present.items() if value not in (None, []))
