"""The closing report on the terminal: replicas, epochs, warnings and verdict."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreplica.agreement.trace.run_report import RunReport
from dreplica.distributed.log_setup import ON_STDOUT
from dreplica.report.record.terminal import replica_values

log = logging.getLogger(__name__)

_MOST_ROWS = 16
"""Rows of a table above which its middle is left out."""
_MOST_WARNINGS = 10


def print_report(console: Console, report: RunReport, announced: Collection[str] = ()) -> None:
    """Print the replicas, the epochs, the spread of independent replicas, the warnings and the verdict.

    Long tables and lists are shortened. `report.json` has all of them, and `log.txt` gets the verdict, too.

    Args:
        console: The console to print to.
        report: The report of a run that has ended.
        announced: Warnings that were printed at the start, which are not repeated.
    """
    console.print(_replicas_table(report))
    if len(report.epochs) > 1:
        console.print(_epochs_table(report))
    if report.spread is not None:
        spread = report.spread
        deviation = "" if spread.accuracy_std is None else f" ± {spread.accuracy_std:.4f} (standard deviation)"
        console.print(
            f"spread over n = {spread.n}: validation accuracy {spread.accuracy_mean:.4f}{deviation}, "
            f"ensemble {spread.ensemble_accuracy:.4f}",
            highlight=False,
        )
        pairs = [spread.disagreement[i][j] for i in range(spread.n) for j in range(i)]
        if pairs:
            console.print(
                f"predictions differ on {min(pairs):.2%} to {max(pairs):.2%} of samples, by pair of replicas",
                highlight=False,
            )
    warnings = [warning for warning in report.warnings if warning not in announced]
    for warning in warnings[:_MOST_WARNINGS]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    if len(warnings) > _MOST_WARNINGS:
        left = len(warnings) - _MOST_WARNINGS
        console.print(f"[yellow]warning:[/yellow] {left} more warnings in report.json", highlight=False)
    _print_verdict(console, report)


def _replicas_table(report: RunReport) -> Table:
    table = Table(title=f"{escape(report.run.name)}: replicas", title_justify="left")
    for column in ("replica", "host", "device", "seed", "train accuracy", "val accuracy", "weights"):
        table.add_column(column, justify="right" if "accuracy" in column else "left")
    last = report.epochs[-1] if report.epochs else None
    train, val = ([], []) if last is None else (last.values("train", "accuracy"), last.values("val", "accuracy"))
    suspects = [] if report.verdict is None else report.verdict.suspects
    for index in shortened(len(report.replicas), suspects):
        if index is None:
            table.add_row("…")
            continue
        replica = report.replicas[index]
        table.add_row(
            str(index),
            *("" if fact is None else escape(str(fact)) for fact in (replica.host, replica.device, replica.seed)),
            *(replica_values([values[index]]) if last else "" for values in (train, val)),
            report.fingerprints[index].digests["weights"][:12] if report.fingerprints else "",
        )
    return table


def _epochs_table(report: RunReport) -> Table:
    table = Table(title="epochs", title_justify="left")
    columns = {"train loss": "loss", "train accuracy": "accuracy", "val loss": "loss", "val accuracy": "accuracy"}
    for column in ("epoch", *columns, "seconds"):
        table.add_column(column, justify="right")
    for index in shortened(len(report.epochs)):
        if index is None:
            table.add_row("…")
            continue
        record = report.epochs[index]
        cells = (replica_values(record.values(name.split()[0], metric)) for name, metric in columns.items())
        seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
        table.add_row(str(record.epoch), *cells, seconds)
    return table


def shortened(count: int, wanted: Collection[int] = ()) -> Iterator[int | None]:
    """Yield the indices of the rows to show, and None in place of each gap.

    Args:
        count: Number of rows.
        wanted: Indices of rows to show in any case, of which at most as many as a whole table has are kept.
    """
    kept = set(range(count))
    if count > _MOST_ROWS:
        half = _MOST_ROWS // 2
        kept = {*range(half), *range(count - half, count), *sorted(wanted)[:_MOST_ROWS]}
    before = -1
    for index in sorted(kept):
        if index > before + 1:
            yield None
        yield index
        before = index


def _print_verdict(console: Console, report: RunReport) -> None:
    verdict = report.verdict
    if verdict is None:
        return
    good = verdict.cause == "none"
    recorded = good and report.coverage is not None and not report.coverage.has_second_copy
    word = ("RECORDED" if recorded else "AGREED") if good else "VERDICT"
    console.print(
        f"[bold {'green' if good else 'red'}]{word}[/] {escape(verdict.summary)}", highlight=False, soft_wrap=True
    )
    log.info("%s %s", word, verdict.summary, extra=ON_STDOUT)
    for label, text in verdict.details():
        console.print(f"  {label}: {escape(text)}", highlight=False, soft_wrap=True)
        log.info("  %s: %s", label, text, extra=ON_STDOUT)
    path = Path(report.run.folder) / "report.html"
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)
