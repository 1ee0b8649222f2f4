"""What a person sees: a progress bar on a terminal, plain lines in a log file, and the closing tables."""

import io
import logging
import os
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dreplica.report.record.run_report import RunReport
from dreplica.training.events import EpochDone, StepDone

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_REFRESH_SECONDS = 0.2


class Screen(Console):
    """Standard output, which may be closed or lack characters: nothing of that ends a run."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        super().__init__()

    def on_broken_pipe(self) -> None:
        """Nobody reads on: the rest goes nowhere."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class ProgressDisplay:
    """Shows steps and epochs as they are done; on ranks other than 0, shows nothing.

    `kept`: how many decoded images the first epoch puts into the cache; 0 without one.
    """

    def __init__(self, console: Console, enabled: bool, expect: str, kept: int = 0) -> None:
        self._enabled = enabled
        self._expect, self._kept = expect, kept
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
        """A step; shown a few times a second on a terminal, every ten seconds in a log."""
        if self._first_epoch is None:
            self._first_epoch = done.epoch
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._progress is not None else _SECONDS_BETWEEN_LINES
        if not self._enabled or now - self._last_shown < wait:
            return
        self._last_shown = now
        agreed = "in agreement" if self._expect == "identical" else "independent"
        state = f"loss {done.tally.loss:.4f}  accuracy {done.tally.accuracy:.4f}  {agreed}"
        if self._kept and done.epoch == self._first_epoch:
            state += f"  {done.tally.count} of {self._kept} images in the cache"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=done.step_in_epoch, total=done.steps_in_epoch, epoch=done.epoch, state=state
            )
        else:
            log.info("epoch %d  step %d of %d  %s", done.epoch, done.step_in_epoch, done.steps_in_epoch, state)

    def epoch(self, done: EpochDone) -> None:
        """An epoch: one line, with every replica's accuracies."""
        if not self._enabled:
            return
        self._last_shown = time.monotonic()
        line = (
            f"epoch {done.epoch:>3}  train {_spell(done.train['accuracy'])}  val {_spell(done.val['accuracy'])}  "
            f"{done.seconds:.1f} s  {done.images_per_second:.0f} images/s per replica"
        )
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            log.info(line)

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()


def print_report(console: Console, report: RunReport) -> None:
    """The closing table of replicas, the spread if replicas are independent, and the verdict last."""
    table = Table(title=f"{escape(report.name)}: replicas", title_justify="left")
    for column in ("replica", "host", "device", "seed", "train accuracy", "val accuracy", "weights"):
        table.add_column(column, justify="right" if "accuracy" in column else "left")
    last = report.epochs[-1] if report.epochs else None
    for index, replica in enumerate(report.replicas):
        table.add_row(
            str(index),
            *("" if replica[key] is None else escape(str(replica[key])) for key in ("host", "device", "seed")),
            f"{last.train['accuracy'][index]:.4f}" if last else "",
            f"{last.val['accuracy'][index]:.4f}" if last else "",
            report.fingerprints[index]["weights"][:12] if report.fingerprints else "",
        )
    console.print(table)
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
                f"predictions differ on {min(pairs):.2%} to {max(pairs):.2%} of samples, pair by pair", highlight=False
            )
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    _print_verdict(console, report)


def _epochs_table(report: RunReport) -> Table:
    table = Table(title="epochs", title_justify="left")
    for column in ("epoch", "train loss", "train accuracy", "val loss", "val accuracy", "seconds"):
        table.add_column(column, justify="right")
    for done in report.epochs:
        cells = (done.train["loss"], done.train["accuracy"], done.val["loss"], done.val["accuracy"])
        table.add_row(str(done.epoch), *(_spell(values) for values in cells), f"{done.seconds:.1f}")
    return table


def _print_verdict(console: Console, report: RunReport) -> None:
    verdict = report.verdict
    if verdict is None:
        return
    good = verdict.cause == "none"
    console.print(
        f"[bold {'green' if good else 'red'}]{'AGREED' if good else 'VERDICT'}[/] {escape(verdict.summary)}",
        highlight=False,
        soft_wrap=True,
    )
    for label, text in verdict.details():
        console.print(f"  {label}: {escape(text)}", highlight=False, soft_wrap=True)
    console.print(f"report: {escape(str(report.folder / 'report.html'))}", highlight=False, soft_wrap=True)


def _spell(values: list[float]) -> str:
    """One value where all replicas have the same, otherwise all."""
    if len(set(values)) == 1:
        return f"{values[0]:.4f}"
    return "/".join(f"{value:.4f}" for value in values)
