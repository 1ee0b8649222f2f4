"""Terminal output: a progress bar, plain lines in a log file, and the closing report."""

import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dreplica.agreement.trace.run_report import RunReport
from dreplica.training.events import EpochDone, StepDone

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_REFRESH_SECONDS = 0.2


class Screen(Console):
    """A console on standard output that survives a closed pipe and a limited encoding."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        super().__init__()

    def on_broken_pipe(self) -> None:
        """Discard all further output, since its reader has closed the pipe."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class ProgressDisplay:
    """A display of steps and epochs, on rank 0 only.

    Args:
        console: The console to print to.
        enabled: False on ranks that print nothing.
        expect: `identical` or `independent`, as in `agreement.expect`.
        num_cached: Number of decoded images that the first epoch writes to the cache, 0 without a cache.
    """

    def __init__(self, console: Console, enabled: bool, expect: str, num_cached: int = 0) -> None:
        self._enabled = enabled
        self._expect, self._num_cached = expect, num_cached
        self._first_epoch: int | None = None
        self._last_shown = time.monotonic()
        self._progress: Progress | None = None
        if enabled and console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task("", epoch=1, state="")
            self._progress.start()

    def step(self, done: StepDone) -> None:
        """Show a step: several times a second on a terminal, every ten seconds in a log."""
        if self._first_epoch is None:
            self._first_epoch = done.epoch
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._progress is not None else _SECONDS_BETWEEN_LINES
        if not self._enabled or now - self._last_shown < wait:
            return
        self._last_shown = now
        agreed = "in agreement" if self._expect == "identical" else "independent"
        state = f"loss {done.tally.loss:.4f}  accuracy {done.tally.accuracy:.4f}  {agreed}"
        if self._num_cached and done.epoch == self._first_epoch:
            state += f"  {done.tally.count} of {self._num_cached} images in the cache"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=done.step_in_epoch, total=done.steps_in_epoch, epoch=done.epoch, state=state
            )
        else:
            log.info("epoch %d  step %d of %d  %s", done.epoch, done.step_in_epoch, done.steps_in_epoch, state)

    def epoch(self, done: EpochDone) -> None:
        """Show one line for an epoch, with the accuracies of every replica."""
        if not self._enabled:
            return
        self._last_shown = time.monotonic()
        line = (
            f"epoch {done.epoch:>3}  train {_join(done.train['accuracy'])}  val {_join(done.val['accuracy'])}  "
            f"{done.seconds:.1f} s  {done.images_per_second:.0f} images/s per replica"
        )
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            log.info(line)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()


def print_report(console: Console, report: RunReport) -> None:
    """Print the replicas, the epochs, the spread of independent replicas, the warnings and the verdict."""
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
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    _print_verdict(console, report)


def _replicas_table(report: RunReport) -> Table:
    table = Table(title=f"{escape(report.run.name)}: replicas", title_justify="left")
    for column in ("replica", "host", "device", "seed", "train accuracy", "val accuracy", "weights"):
        table.add_column(column, justify="right" if "accuracy" in column else "left")
    last = report.epochs[-1] if report.epochs else None
    train, val = ([], []) if last is None else (last.values("train", "accuracy"), last.values("val", "accuracy"))
    for index, replica in enumerate(report.replicas):
        table.add_row(
            str(index),
            *("" if fact is None else escape(str(fact)) for fact in (replica.host, replica.device, replica.seed)),
            *(_number(values[index]) if last else "" for values in (train, val)),
            report.fingerprints[index].digests["weights"][:12] if report.fingerprints else "",
        )
    return table


def _epochs_table(report: RunReport) -> Table:
    table = Table(title="epochs", title_justify="left")
    columns = {"train loss": "loss", "train accuracy": "accuracy", "val loss": "loss", "val accuracy": "accuracy"}
    for column in ("epoch", *columns, "seconds"):
        table.add_column(column, justify="right")
    for record in report.epochs:
        cells = (_join(record.values(name.split()[0], metric)) for name, metric in columns.items())
        seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
        table.add_row(str(record.epoch), *cells, seconds)
    return table


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
    for label, text in verdict.details():
        console.print(f"  {label}: {escape(text)}", highlight=False, soft_wrap=True)
    path = Path(report.run.folder) / "report.html"
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)


def _join(values: Sequence[float | None]) -> str:
    """Return the value that all replicas have, or each replica's value."""
    return "/".join(map(_number, values[:1] if len(set(values)) == 1 else values))


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
