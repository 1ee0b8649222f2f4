"""Summarize `trace.jsonl` in a fixed number of cells: steps compared and steps that differ.

The file is read as a stream, in constant memory, up to the last complete line or the first damaged one. A run in
progress still appends to it, and a crash leaves a partial line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from dreplica.agreement.trace.reader import Trace
from dreplica.errors import UsageError

MOST_CELLS = 160


@dataclass
class Cell:
    """A range of consecutive steps."""

    first: int
    last: int
    compared: int = 0
    """Number of these steps that were compared."""
    differing: int = 0
    """Number of these steps at which replicas differ, evaluations included."""


@dataclass
class TraceSummary:
    """The summary of a trace for the page."""

    num_replicas: int | None = None
    """The number of replicas. None if there is no header."""
    cells: list[Cell] = field(default_factory=list)
    build_agreed: bool | None = None
    """True if replicas agreed at step 0. None if step 0 is not recorded."""
    last_step: int | None = None
    last_epoch: int | None = None
    first_differing: int | None = None
    num_compared: int = 0
    num_differing: int = 0
    cut: bool = False
    """True if the lines after some line cannot be read, for example after a partial line."""
    problem: str | None = None
    """What is wrong with the file, if it is damaged."""


def read_trace(path: Path, most_cells: int = MOST_CELLS) -> TraceSummary:
    """Read the summary of a trace.

    Args:
        path: The trace file. A missing file gives an empty summary.
        most_cells: Limit of cells. All cells have the same number of steps.
    """
    summary = TraceSummary()
    if not path.exists():
        return summary
    strip = _Strip(most_cells)
    previous: tuple[int, bool] | None = None
    try:
        trace = Trace(path)
        summary.num_replicas = trace.num_replicas
        for line in trace.lines():
            (step, _), epoch, agreed = line.key, line.epoch, line.agreed
            summary.last_step, summary.last_epoch = step, epoch if epoch is not None else summary.last_epoch
            if not agreed and summary.first_differing is None:
                summary.first_differing = step
            if step == 0:
                summary.build_agreed = agreed and summary.build_agreed is not False
                continue
            # An evaluation has a separate line with the number of the step before it. A run that was interrupted after
            # a divergence resumes from an earlier step, so steps can repeat.
            counted = previous is not None and previous[0] == step and not previous[1]
            strip.add(step, compared=int(step > strip.last), differing=int(not agreed and not counted))
            previous = step, agreed and not counted
        summary.cut = trace.is_cut_off
    except UsageError as error:
        summary.cut, summary.problem = True, str(error)
    summary.cells = strip.cells()
    summary.num_compared = sum(cell.compared for cell in summary.cells)
    summary.num_differing = sum(cell.differing for cell in summary.cells)
    return summary


class _Strip:
    """Cells that double in width when there would be more than `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = 1
        self._counts: list[list[int]] = []
        self.last = 0

    def add(self, step: int, compared: int, differing: int) -> None:
        while (step - 1) // self._width >= self._most:
            pairs = zip(self._counts[::2], [*self._counts[1::2], [0, 0]], strict=False)
            self._counts = [[one[0] + other[0], one[1] + other[1]] for one, other in pairs]
            self._width *= 2
        index = (step - 1) // self._width
        self._counts += [[0, 0] for _ in range(index + 1 - len(self._counts))]
        self._counts[index][0] += compared
        self._counts[index][1] += differing
        self.last = max(self.last, step)

    def cells(self) -> list[Cell]:
        width = self._width
        cells = [Cell(1 + i * width, (i + 1) * width, *counts) for i, counts in enumerate(self._counts)]
        if cells:
            cells[-1].last = self.last
        return cells
