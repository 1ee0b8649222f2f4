"""The numbers that figures are drawn from: lines, ticks and tables."""

import math
from itertools import pairwise

import pytest

from dreplica.report.html.charts import LineChart, line_chart, nice_ticks


def chart(*rows: list[float | None], **options: bool) -> LineChart:
    made = line_chart("Loss", list(range(1, len(rows) + 1)), {"training": list(rows)}, **options)
    assert made is not None
    return made


def test_equal_curves_share_a_line() -> None:
    same = chart([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert [line.label for line in same.lines] == ["all replicas"]
    apart = chart([1.0, 1.0, 1.0], [2.0, math.nextafter(2.0, 3.0), 2.0])
    assert [line.label for line in apart.lines] == ["replicas 0, 2", "replica 1"]
    assert apart.lines[0].color != apart.lines[1].color
    assert apart.table.columns == ["epoch", "training, replicas 0, 2", "training, replica 1"]
    assert apart.table.rows[1][2] == ("2", math.nextafter(2.0, 3.0))


def test_points_match_ticks() -> None:
    made = chart([0.0], [4.0], [1.0])
    assert [(tick.at, tick.label) for tick in made.y_ticks] == [(25.0 * n, str(n)) for n in range(5)]
    assert [(tick.at, tick.label) for tick in made.x_ticks] == [(0.0, "1"), (50.0, "2"), (100.0, "3")]
    assert made.lines[0].path == "M0 100L50 0L100 75"
    assert chart([1.0]).lines[0].path == "M50 50", "a single epoch is in the middle"


def test_missing_values_are_gaps_with_a_note() -> None:
    made = chart([1.0], [None], [math.inf], [2.0], [3.0])
    assert made.lines[0].path == "M0 100M75 50L100 0"
    assert made.notes == ["2 values are infinite, beyond 1e+300 or not a number, and not drawn"]
    assert made.table.rows[1][1][0] == "not finite"
    assert line_chart("Loss", [], {"training": []}) is None


def test_chart_without_numbers_has_a_table() -> None:
    made = chart([None, None])
    assert (made.lines, made.notes) == ([], ["2 values are infinite, beyond 1e+300 or not a number, and not drawn"])
    assert [cell[0] for cell in made.table.rows[0]] == ["1", "not finite"]


@pytest.mark.parametrize("values", [(1e308, -1e308), (-5.0, 1e300), (1e-300, -1e308), (0.0, 5e-324), (-1e300, 1e300)])
def test_extreme_numbers_are_listed_and_drawn_if_possible(values: tuple[float, float]) -> None:
    made = chart(*([value] for value in values))
    drawn = [value for value in values if abs(value) <= 1e300]
    assert "".join(line.path for line in made.lines).count(" ") == len(drawn)
    assert not any(word in repr(made) for word in ("inf,", "nan", "inf "))
    assert [row[1] for row in made.table.rows] == [(f"{value:.6g}", value) for value in values]


def test_absent_replica_has_no_point() -> None:
    made = chart([1.0], [2.0, 3.0])
    assert [line.label for line in made.lines] == ["replica 0", "replica 1"]
    assert made.lines[1].path == "M100 0"


def test_logarithmic_axis_leaves_out_zero() -> None:
    made = chart([0.0, 1e-6], [0.0, 1e-3], logarithmic=True)
    assert [tick.label for tick in made.y_ticks] == ["1e-6", "1e-5", "1e-4", "1e-3"]
    assert [(line.label, line.path) for line in made.lines] == [("replica 1", "M0 100L100 0")]
    assert not made.notes


def test_accuracy_axis_ends_at_one() -> None:
    assert [tick.label for tick in chart([1.0], [1.0], in_percent=True).y_ticks][-1] == "100%"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.71, 0.98), (-3, 5), (1e-9, 2e-9), (7, 7), (0, 0), (1, 1e6)])
def test_ticks_enclose_values_in_even_steps(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low * (1 + 1e-9 * (low < 0))
    assert high <= ticks[-1] * (1 + 1e-9)
    assert 3 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))
