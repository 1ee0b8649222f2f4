"""Compute the figures of the page. Lines and ticks are in percent of the plot, so that it can have any width."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_NUM_COLORS = 8
"""Number of colors in the palette of the page."""
_LARGEST = 1e300
"""Largest number that is drawn. The difference of larger ones may be infinite."""
_SMALLEST = 1e-290
"""Smallest range of an axis. A smaller one counts as empty."""
_MOST_DOTS = 60
"""Limit of points of a line that are marked with dots."""
LAST = -sys.float_info.max
"""Sort key of cells without a number. The script of the page cannot read infinity."""


@dataclass
class Tick:
    """A mark on an axis."""

    at: float
    """Position in percent of the plot, from the left or from the bottom."""
    label: str


@dataclass
class Line:
    """One line of a chart, for one replica or several with identical values."""

    label: str
    color: int
    dashed: bool
    path: str
    """SVG path of the line in a plot of 100 by 100, y downwards."""
    dots: str
    """SVG path of the dots, as segments of zero length. Empty if there are many points."""


@dataclass
class Table:
    """Data of a figure or facts. A cell is a text, or a text and the number to sort by."""

    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class LineChart:
    """A chart of lines over epochs."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    table: Table
    notes: list[str] = field(default_factory=list)


def line_chart(
    title: str,
    epochs: Sequence[int],
    parts: Mapping[str, Sequence[Sequence[float | None]]],
    in_percent: bool = False,
    logarithmic: bool = False,
) -> LineChart | None:
    """Return a chart with a curve for every replica, or None if there is nothing to draw.

    Args:
        title: Title of the chart.
        epochs: Epochs along the x axis.
        parts: Name (`training`, `validation`) to one row per epoch, with one value per replica. A value that is
            infinite or NaN is None. With several parts, the first is dashed.
        in_percent: True if values are fractions, which are shown in percent.
        logarithmic: True for a logarithmic y axis. Values of 0 are then not drawn.
    """
    drawn = {part: [[_height(value, logarithmic) for value in row] for row in rows] for part, rows in parts.items()}
    heights = [value for rows in drawn.values() for row in rows for value in row if value is not None]
    num_missing = sum(not _is_drawn(value) for rows in parts.values() for row in rows for value in row)
    if not epochs or not (heights or num_missing):
        return None
    heights = heights or [0.0, 1.0]  # the empty plot shows that there are only missing values
    ticks = nice_ticks(min(heights), max(heights), whole=logarithmic)
    if in_percent and max(heights) <= 1:
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    low, high = min(*ticks, *heights), max(*ticks, *heights)

    def x(epoch: int) -> float:
        return 100 * (epoch - epochs[0]) / (epochs[-1] - epochs[0]) if len(epochs) > 1 else 50.0

    lines = []
    replicas = max(len(row) for rows in parts.values() for row in rows)
    for number, (part, rows) in enumerate(drawn.items()):
        for ids in _equal_curves(rows, replicas):
            column = [row[ids[0]] if ids[0] < len(row) else None for row in rows]
            points = [
                None if value is None else (x(epoch), 100 * (high - value) / (high - low))
                for epoch, value in zip(epochs, column, strict=True)
            ]
            name = name_replicas(ids, replicas)
            label = f"{part}, {name}" if len(parts) > 1 else name
            if any(points):
                lines.append(Line(label, ids[0] % _NUM_COLORS, number == 0 and len(parts) > 1, *_paths(points)))
    return LineChart(
        title,
        lines,
        [Tick(x(epoch), str(epoch)) for epoch in _whole_ticks(epochs[0], epochs[-1])],
        [Tick(100 * (tick - low) / (high - low), _tick_text(tick, in_percent, logarithmic)) for tick in ticks],
        _table_of(epochs, parts, replicas),
        [f"{num_missing} values are infinite, beyond {_LARGEST:g} or not a number, and not drawn"]
        if num_missing
        else [],
    )


def _height(value: float | None, logarithmic: bool) -> float | None:
    if value is None or not _is_drawn(value):
        return None
    if not logarithmic:
        return value
    return math.log10(value) if value > 0 else None


def _tick_text(tick: float, in_percent: bool, logarithmic: bool) -> str:
    return f"1e{tick:.0f}" if logarithmic else number_text(tick, in_percent)


def _equal_curves(rows: Sequence[Sequence[float | None]], replicas: int) -> list[list[int]]:
    """Group replicas by equal curves."""
    groups: dict[str, list[int]] = {}
    for replica_id in range(replicas):
        curve = [row[replica_id] if replica_id < len(row) else None for row in rows]
        groups.setdefault(repr(curve), []).append(replica_id)
    return list(groups.values())


def _paths(points: Sequence[tuple[float, float] | None]) -> tuple[str, str]:
    line, dots, pen_is_down = [], [], False
    for index, point in enumerate(points):
        if point is None:
            pen_is_down = False
            continue
        x, y = (f"{value:.2f}".rstrip("0").rstrip(".") for value in point)
        line.append(f"{'L' if pen_is_down else 'M'}{x} {y}")
        neighbours = [*points[max(index - 1, 0) : index], *points[index + 1 : index + 2]]
        if len(points) <= _MOST_DOTS or all(neighbour is None for neighbour in neighbours):
            dots.append(f"M{x} {y}h0")
        pen_is_down = True
    return "".join(line), "".join(dots)


def _table_of(epochs: Sequence[int], parts: Mapping[str, Sequence[Sequence[float | None]]], replicas: int) -> Table:
    columns = ["epoch"]
    cells: list[list[Any]] = [[(str(epoch), epoch)] for epoch in epochs]
    for part, rows in parts.items():
        groups = _equal_curves(rows, replicas)
        columns += [f"{part}, {name_replicas(ids, replicas)}" for ids in groups]
        for line, row in zip(cells, rows, strict=True):
            line += [exact(row[ids[0]] if ids[0] < len(row) else None) for ids in groups]
    return Table(columns, cells)


def name_replicas(ids: Sequence[int], replicas: int) -> str:
    """Return the name of a set of replicas: `all replicas`, `replica 1` or `replicas 0, 2`."""
    if len(ids) == replicas > 1:
        return "all replicas"
    return f"replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"


def exact(value: Any) -> tuple[str, float]:
    """Return a cell with a number. A value that is infinite, NaN or missing sorts first."""
    if not _is_finite(value):
        return "not finite", LAST
    return f"{value:.6g}", value


def percent(value: float) -> tuple[str, float]:
    """Return a cell with a fraction in percent."""
    return f"{100 * value:.6g}%", value


def nice_ticks(low: float, high: float, about: int = 4, whole: bool = False) -> list[float]:
    """Return round numbers that enclose a range, in steps of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: Lower end of the range, at least -1e300.
        high: Upper end of the range, at most 1e300.
        about: Approximate number of intervals.
        whole: True for integers only.
    """
    if not high - low > _SMALLEST:
        margin = (abs(low) if abs(low) > _SMALLEST else 1.0) / 10
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number_text(value: float, in_percent: bool = False) -> str:
    """Return a number as text for an axis."""
    return f"{100 * value:.4g}%" if in_percent else f"{value:.4g}"


def _whole_ticks(first: int, last: int) -> list[int]:
    """Return a few round numbers from `first` to `last`."""
    if first == last:
        return [first]
    return [int(tick) for tick in nice_ticks(first, last, about=6, whole=True) if first <= tick <= last]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_drawn(value: Any) -> bool:
    return _is_finite(value) and abs(value) <= _LARGEST
