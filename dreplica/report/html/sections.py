"""Figures and tables below the verdict: divergence, training, time and spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreplica.agreement.trace.report_records import OperatorRecord, PathRecord
from dreplica.diagnosis.measurement.error_propagation import evenly
from dreplica.report.html.charts import (
    LineChart,
    Table,
    Tick,
    exact,
    line_chart,
    nice_ticks,
    number_text,
    percent,
)
from dreplica.report.html.run_files import RunFiles
from dreplica.state.stages import STAGES
from dreplica.training.events import PHASES

_MOST_VALUES = 4000
"""Limit of values per part in a chart's table, so that the page stays small enough to mail."""
_MOST_IN_PAIRS = 40
"""Limit of replicas in a table of all pairs."""
_PHASE_ENDS_IN = {"forward": "the loss", "backward": "the gradients", "optimizer": "the updated weights"}


@dataclass
class PathRow:
    """An operator between the first difference and the outputs."""

    operator: str
    place: str
    ulp: str
    relative: str
    width: float
    """Length of the bar in percent, on a logarithmic scale of the distance."""


@dataclass
class OperatorPath:
    """Differences of results, operator by operator."""

    compared: str
    ends_in: str
    num_operators: int
    rows: list[PathRow]
    table: Table


@dataclass
class StageRow:
    """One stage of the divergent step, with a group number for each replica."""

    name: str
    groups: list[int]
    differs: bool


@dataclass
class Bar:
    """Time of one replica by phase."""

    replica: str
    parts: list[tuple[str, float]]
    """Name and percent of each phase."""


@dataclass
class SpreadFigure:
    """Accuracies of independent replicas on one axis, in percent of its width."""

    summary: str
    ticks: list[Tick]
    dots: list[tuple[float, float, str]]
    """Percent from the left, percent from the top and title of each dot. Dots do not hide each other."""
    mean: float
    deviation: tuple[float, float] | None
    """Positions of mean - sd and mean + sd."""
    ensemble: float
    table: Table
    disagreement: Table | None


def operator_path(run: RunFiles) -> OperatorPath | None:
    """Return the differences that the diagnosis measured, or None if there are none."""
    path = run.report.divergence.path if run.report and run.report.divergence else None
    if not isinstance(path, PathRecord) or not path.operators:
        return None
    operators = path.operators
    one, other = path.replicas
    most = max(math.log2(1 + (row.max_ulp or 0)) for row in operators) or 1.0
    rows = [
        PathRow(
            short_name(row.operator),
            row.module or "outside of modules",
            _ulps(row),
            "" if row.relative is None else f"{row.relative:.1e}",
            100.0 if row.max_ulp is None else 100 * math.log2(1 + row.max_ulp) / most,
        )
        for row in operators
    ]
    columns = ["#", "operator", "module", "phase", "ULP", "absolute", "relative", "elements that differ", "of"]
    cells = [
        [
            (str(row.index), row.index),
            row.operator,
            row.module or "",
            row.phase,
            *(exact(value) for value in (row.max_ulp, row.max_absolute, row.relative)),
            (f"{row.num_differing:,}", row.num_differing),
            (_compared(row), row.num_elements),
        ]
        for row in operators
    ]
    return OperatorPath(
        f"two replays on replica {one}" if one == other else f"replica {one} against replica {other}",
        _PHASE_ENDS_IN.get(operators[0].phase, "the end of its phase"),
        path.num_operators,
        rows,
        Table(columns, cells),
    )


def short_name(operator: str) -> str:
    """Return the short name of an operator: `convolution` for `aten.convolution.default`."""
    name = operator.removeprefix("aten.")
    return name.removesuffix(".default")


def _ulps(row: OperatorRecord) -> str:
    if row.max_ulp is None:
        return "not a number"
    if not row.num_differing:
        return "none in those compared" if row.num_elements else "no floating-point result"
    return f"{row.max_ulp:,} ULP" if row.max_ulp < 10**8 else f"{row.max_ulp:.1e} ULP"


def _compared(row: OperatorRecord) -> str:
    if row.num_compared == row.num_elements:
        return f"{row.num_elements:,}"
    return f"{row.num_compared:,} compared of {row.num_elements:,}"


def stage_grid(run: RunFiles) -> list[StageRow]:
    """Return one row per stage compared at the divergent step, or an empty list if there is none."""
    groups = (run.report.divergence.stage_groups if run.report and run.report.divergence else None) or {}
    rows = []
    for stage in (name for name in STAGES if name in groups):
        numbers = {replica_id: number for number, ids in enumerate(groups[stage]) for replica_id in ids}
        rows.append(StageRow(stage, [numbers[r] for r in sorted(numbers)], len(groups[stage]) > 1))
    return rows


def grid_table(rows: Sequence[StageRow]) -> Table:
    """Return the data of the grid as a table."""
    replicas = len(rows[0].groups)
    columns = ["stage", *(f"replica {r}" for r in range(replicas))]
    return Table(columns, [[row.name, *(group_name(number) for number in row.groups)] for row in rows])


def group_name(number: int) -> str:
    """Return the letter of a group: A for the largest group of a stage, then B, C, …"""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def training_charts(run: RunFiles) -> list[LineChart]:
    """Return charts of loss and accuracy by epoch. Of many epochs, evenly spaced ones are shown."""
    shown = evenly(run.epochs, max(20, _MOST_VALUES // run.num_replicas))
    epochs = [row["epoch"] for row in shown]
    charts = []
    for title, key in (("Loss", "loss"), ("Accuracy", "accuracy")):
        parts = {
            name: [row[part].get(key, []) for row in shown]
            for name, part in (("training", "train"), ("validation", "val"))
        }
        if any(any(rows) for rows in parts.values()):
            charts.append(line_chart(title, epochs, parts, in_percent=key == "accuracy"))
    return [chart for chart in charts if chart is not None]


def distance_charts(run: RunFiles) -> list[LineChart]:
    """Return one chart per stage of the Euclidean distance from replica 0 by epoch, after a divergence."""
    by_epoch = {record.epoch: record.l2 for record in (run.report.distance if run.report else [])}
    epochs = sorted(by_epoch)
    charts = []
    for stage in STAGES:
        if epochs and all(stage in by_epoch[epoch] for epoch in epochs):
            values = {"distance": [by_epoch[epoch][stage] for epoch in epochs]}
            charts.append(line_chart(stage.capitalize(), epochs, values, logarithmic=True))
    return [chart for chart in charts if chart is not None]


def time_bars(run: RunFiles) -> tuple[list[Bar], Table] | None:
    """Return the time of each replica by phase, or None if no epoch was timed.

    Returns:
        One bar per replica over all timed epochs, and a table of seconds per epoch. Of many epochs, the table has
        evenly spaced ones.
    """
    measured = [row for row in run.epochs if any(row.get("timing", {}).values())]
    if not measured:
        return None
    replicas = max(len(values) for row in measured for values in row["timing"].values())
    totals = {
        phase: [sum(_at(row["timing"].get(phase, []), r) for row in measured) for r in range(replicas)]
        for phase in PHASES
    }
    bars = []
    for r in range(replicas):
        whole = sum(totals[phase][r] for phase in PHASES) or 1.0
        bars.append(Bar(f"replica {r}", [(phase, 100 * totals[phase][r] / whole) for phase in PHASES]))
    rows = [
        [(str(row["epoch"]), row["epoch"]), str(r), *(exact(_at(row["timing"].get(phase, []), r)) for phase in PHASES)]
        for row in evenly(measured, max(1, _MOST_VALUES // 10 // replicas))
        for r in range(replicas)
    ]
    return bars, Table(["epoch", "replica", *(f"{phase}, s" for phase in PHASES)], rows)


def _at(values: Sequence[float], replica_id: int) -> float:
    return values[replica_id] if replica_id < len(values) else 0.0


def spread_figure(run: RunFiles) -> SpreadFigure | None:
    """Return the spread of independent replicas, or None if the report has none."""
    spread = run.report.spread if run.report else None
    if spread is None or not run.epochs:
        return None
    values = run.epochs[-1]["val"].get("accuracy") or []
    mean, deviation, ensemble = spread.accuracy_mean, spread.accuracy_std, spread.ensemble_accuracy
    ends = [] if deviation is None else [mean - deviation, mean + deviation]
    shown = [*values, mean, ensemble, *ends]
    ticks = [tick for tick in nice_ticks(min(shown), max(shown)) if tick <= max(1, *shown) + 1e-9]
    low = ticks[0]
    width = max(ticks[-1], *shown) - low

    def at(value: float) -> float:
        return 100 * (value - low) / width

    around = "" if deviation is None else f" ± {100 * deviation:.3g} (standard deviation)"
    pairs = [value for i, row in enumerate(spread.disagreement) for value in row[:i]]
    summary = f"Validation accuracy {100 * mean:.4g}%{around}, n = {spread.n}; ensemble {100 * ensemble:.4g}%."
    if pairs:
        least = "" if min(pairs) == max(pairs) else f"{min(pairs):.2%} to "
        summary += f" Two replicas predict different classes for {least}{max(pairs):.2%} of the samples."
    return SpreadFigure(
        summary,
        [Tick(at(tick), number_text(tick, in_percent=True)) for tick in ticks],
        [
            (at(value), 100 * (r + 1) / (len(values) + 1), f"replica {r}: {percent(value)[0]}")
            for r, value in enumerate(values)
        ],
        at(mean),
        None if deviation is None else (at(mean - deviation), at(mean + deviation)),
        at(ensemble),
        Table(["replica", "validation accuracy"], [[(str(r), r), percent(value)] for r, value in enumerate(values)]),
        Table(
            ["replica", *(str(r) for r in range(spread.n))],
            [[(str(r), r), *((f"{value:.2%}", value) for value in row)] for r, row in enumerate(spread.disagreement)],
            "Fraction of the validation samples for which two replicas predict different classes",
        )
        if pairs and spread.n <= _MOST_IN_PAIRS
        else None,
    )
