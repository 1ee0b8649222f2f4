"""What stands beneath the verdict: where replicas parted, how training went, where the time went, what it ran on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from dreplica.report.html.run_files import RunFiles, by_epoch
from dreplica.state.stages import STAGES
from dreplica.training.events import PHASES

_MOST_VALUES = 4000
"""In a chart's table, by part of the data; a tenth as many rows in that of seconds. A page is to be mailed."""
_MOST_IN_PAIRS = 40
"""Replicas, in a table of every one against every other."""
_PHASE_ENDS_IN = {"forward": "the loss", "backward": "the gradients", "optimizer": "the updated weights"}


@dataclass
class PathRow:
    """An operator on the way from the first difference to the outputs."""

    operator: str
    place: str
    ulp: str
    relative: str
    width: float
    """Percent: the logarithm of the distance."""


@dataclass
class OperatorPath:
    """How far results are apart, operator by operator."""

    compared: str
    ends_in: str
    num_operators: int
    rows: list[PathRow]
    table: Table


@dataclass
class StageRow:
    """One stage of the step at which replicas parted: a class number for each replica."""

    name: str
    classes: list[int]
    differs: bool


@dataclass
class Bar:
    """Where one replica's time went."""

    replica: str
    parts: list[tuple[str, float]]
    """Phase and percent."""


@dataclass
class SpreadFigure:
    """Accuracies of independent replicas on one axis; places in percent from the left."""

    summary: str
    ticks: list[Tick]
    dots: list[tuple[float, float, str]]
    """From the left, from the top (so that none hides another), and what it is."""
    mean: float
    deviation: tuple[float, float] | None
    """Where mean - sd and mean + sd are."""
    ensemble: float
    table: Table
    disagreement: Table | None


def operator_path(run: RunFiles) -> OperatorPath | None:
    """The path that the diagnosis measured; None if there is none."""
    path = ((run.report or {}).get("divergence") or {}).get("path") or {}
    operators = path.get("operators") or []
    if not operators:
        return None
    one, other = path["replicas"]
    most = max(math.log2(1 + (row["max_ulp"] or 0)) for row in operators) or 1.0
    rows = [
        PathRow(
            short_name(row["operator"]),
            row["module"] or "outside of modules",
            _ulps(row),
            "" if row["relative"] is None else f"{row['relative']:.1e}",
            100.0 if row["max_ulp"] is None else 100 * math.log2(1 + row["max_ulp"]) / most,
        )
        for row in operators
    ]
    columns = ["#", "operator", "module", "phase", "ULP", "absolute", "relative", "elements that differ", "of"]
    cells = [
        [
            (str(row["index"]), row["index"]),
            row["operator"],
            row["module"] or "",
            row["phase"],
            *(exact(row[key]) for key in ("max_ulp", "max_absolute", "relative")),
            (f"{row['num_differing']:,}", row["num_differing"]),
            (_compared(row), row["num_elements"]),
        ]
        for row in operators
    ]
    return OperatorPath(
        f"two replays on replica {one}" if one == other else f"replica {one} against replica {other}",
        _PHASE_ENDS_IN.get(operators[0]["phase"], "the end of its phase"),
        path["num_operators"],
        rows,
        Table(columns, cells),
    )


def short_name(operator: str) -> str:
    """`convolution` for `aten.convolution.default`."""
    name = operator.removeprefix("aten.")
    return name.removesuffix(".default")


def _ulps(row: Mapping[str, Any]) -> str:
    if row["max_ulp"] is None:
        return "not a number"
    if not row["num_differing"]:
        return "none in those compared" if row["num_elements"] else "no floating-point result"
    return f"{row['max_ulp']:,} ULP" if row["max_ulp"] < 10**8 else f"{row['max_ulp']:.1e} ULP"


def _compared(row: Mapping[str, Any]) -> str:
    if row["num_compared"] == row["num_elements"]:
        return f"{row['num_elements']:,}"
    return f"{row['num_compared']:,} compared of {row['num_elements']:,}"


def stage_grid(run: RunFiles) -> list[StageRow]:
    """Stages against replicas, at the step where they parted; empty if they did not."""
    classes = ((run.report or {}).get("divergence") or {}).get("stage_classes") or {}
    rows = []
    for stage in (name for name in STAGES if name in classes):
        numbers = {replica_id: number for number, ids in enumerate(classes[stage]) for replica_id in ids}
        rows.append(StageRow(stage, [numbers[r] for r in sorted(numbers)], len(classes[stage]) > 1))
    return rows


def grid_table(rows: Sequence[StageRow]) -> Table:
    """The grid's data."""
    replicas = len(rows[0].classes)
    columns = ["stage", *(f"replica {r}" for r in range(replicas))]
    return Table(columns, [[row.name, *(class_name(number) for number in row.classes)] for row in rows])


def class_name(number: int) -> str:
    """A, B, C, …; the largest class of a stage is A."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def training_charts(run: RunFiles) -> list[LineChart]:
    """Loss and accuracy of every replica, epoch by epoch; of very many epochs, evenly spaced ones."""
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
    """How far replicas that have parted and gone on are from replica 0: Euclidean, stage by stage, epoch by epoch."""
    rows = by_epoch((run.report or {}).get("distance") or [])
    epochs = [row["epoch"] for row in rows]
    charts = []
    for stage in STAGES:
        if rows and all(stage in row for row in rows):
            values = {"distance": [row[stage]["l2"] for row in rows]}
            charts.append(line_chart(stage.capitalize(), epochs, values, logarithmic=True))
    return [chart for chart in charts if chart is not None]


def time_bars(run: RunFiles) -> tuple[list[Bar], Table] | None:
    """Where each replica's time went over all epochs that were measured, and the seconds of these, or of evenly spaced
    ones where there are many; None if none were."""
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
    """The spread of independent replicas; None where they were to be identical."""
    spread = (run.report or {}).get("spread")
    if not spread or not run.epochs:
        return None
    values = run.epochs[-1]["val"].get("accuracy") or []
    mean, deviation, ensemble = spread["accuracy_mean"], spread["accuracy_std"], spread["ensemble_accuracy"]
    ends = [] if deviation is None else [mean - deviation, mean + deviation]
    shown = [*values, mean, ensemble, *ends]
    ticks = [tick for tick in nice_ticks(min(shown), max(shown)) if tick <= max(1, *shown) + 1e-9]
    low = ticks[0]
    width = max(ticks[-1], *shown) - low

    def at(value: float) -> float:
        return 100 * (value - low) / width

    around = "" if deviation is None else f" ± {100 * deviation:.3g} (standard deviation)"
    pairs = [value for i, row in enumerate(spread["disagreement"]) for value in row[:i]]
    summary = f"Validation accuracy {100 * mean:.4g}%{around}, n = {spread['n']}; ensemble {100 * ensemble:.4g}%."
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
            ["replica", *(str(r) for r in range(spread["n"]))],
            [
                [(str(r), r), *((f"{value:.2%}", value) for value in row)]
                for r, row in enumerate(spread["disagreement"])
            ],
            "Part of the validation samples on which two replicas predict different classes",
        )
        if pairs and spread["n"] <= _MOST_IN_PAIRS
        else None,
    )
