"""Terminal output during a run: a progress bar on a terminal, plain lines elsewhere, and a line for each epoch."""

import io
import logging
import math
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dreplica.distributed.log_setup import ON_STDOUT
from dreplica.training.events import EpochDone, StepDone

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_REFRESH_SECONDS = 0.2

EPOCH_HEADER = "epoch  train loss    accuracy    val loss    accuracy       lr images/s    time"
"""Column titles of the epoch lines. Images per second are those of rank 0's training."""


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
        self._has_header = False
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
        """Show one line for an epoch, below a header line for the first one."""
        if not self._enabled:
            return
        self._last_shown = time.monotonic()
        lines = [epoch_line(done)] if self._has_header else [EPOCH_HEADER, epoch_line(done)]
        self._has_header = True
        for line in lines:
            if self._progress is not None:
                self._progress.console.print(line, highlight=False)
                log.info(line, extra=ON_STDOUT)
            else:
                log.info(line)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()


def epoch_line(done: EpochDone) -> str:
    """Return the line of an epoch, 79 columns wide, as `EPOCH_HEADER` names them."""
    columns = (done.train["loss"], done.train["accuracy"], done.val["loss"], done.val["accuracy"])
    values = "".join(f"{replica_values(column):>12}" for column in columns)
    rates = sorted({rate for own in done.lr for rate in own})
    lr = "-".join(f"{rate:.3g}" for rate in dict.fromkeys(rates[:1] + rates[-1:]))
    return f"{done.epoch:>5}{values}{lr:>9}{done.images_per_second:>9.0f}{_duration(done.seconds):>8}"


def replica_values(given: Sequence[float | None]) -> str:
    """Return the value that all replicas have, those of two replicas, or the range of more."""
    values = [math.nan if value is None else value for value in given]
    if len(set(values)) == 1 or all(map(math.isnan, values)):
        return _number(values[0], 4)
    if len(values) == 2:
        return "/".join(_number(value, 3) for value in values)
    if any(map(math.isnan, values)):
        return "nan"
    return f"{_number(min(values), 3)}-{_number(max(values), 3)}"


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 1000:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 60000 else f"{seconds / 3600:.1f} h"
