"""report.html: one file that needs no network, made of what is in the run folder alone.

Jinja2 escapes everything that is put into the page. Should something slip through all the same, the page's own policy
lets no script run but the one that is its own, by its digest, and nothing be fetched from anywhere.
"""

import base64
import hashlib
import logging
import os
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dreplica import __version__
from dreplica.report.html import environment_tables as environment
from dreplica.report.html import sections
from dreplica.report.html.charts import Tick
from dreplica.report.html.headline import duration, headline
from dreplica.report.html.run_files import RunFiles, read_run
from dreplica.report.html.trace_summary import Cell

log = logging.getLogger(__name__)

FILE_NAME = "report.html"

_TEMPLATES = Path(__file__).parent / "template"


def write_report(folder: Path) -> Path:
    """Makes report.html of what is in a run folder, whole or not at all, and returns its path.

    Raises UsageError if `folder` is no run folder, OSError if the file cannot be written.
    """
    path = folder / FILE_NAME
    temporary = folder / f"{FILE_NAME}.{os.getpid()}.tmp"
    page = render(read_run(folder))
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def render(run: RunFiles) -> str:
    """The page."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    report = run.report or {}
    seconds = (report.get("run") or {}).get("seconds")
    steps = report.get("steps_checked")
    devices = sorted({str(row.get("device")) for row in report.get("replicas") or [] if row.get("device")})
    facts = [
        f"{run.num_replicas} replica{'s' * (run.num_replicas != 1)}",
        *devices,
        "" if steps is None else f"{steps:,} step{'s' * (steps != 1)} compared",
        "" if seconds is None else duration(seconds),
    ]
    grid = sections.stage_grid(run)
    return template().render(
        run=run,
        facts=[fact for fact in facts if fact],
        top=headline(run),
        warnings=[*run.problems, *(report.get("warnings") or [])],
        skipped=report.get("skipped") or {},
        trace=run.trace,
        strip_ticks=_strip_ticks(run.trace.cells),
        verdict_at=_place_of(run.trace.cells, ((report.get("verdict") or {}).get("step"))),
        expect=report.get("expect"),
        grid=grid,
        grid_table=sections.grid_table(grid) if grid else None,
        path=sections.operator_path(run),
        spread=sections.spread_figure(run),
        charts=sections.training_charts(run),
        distances=sections.distance_charts(run),
        time=sections.time_bars(run),
        replicas=environment.replicas_table(run),
        environment=environment.environment_table(run),
        manifest=environment.manifest_table(run),
        on_gpu=any((row.get("device") or {}).get("type") == "cuda" for row in run.manifests),
        class_name=sections.class_name,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


@cache
def template() -> Template:
    """The page's, compiled once in a process."""
    loader = FileSystemLoader(_TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("report.html.j2")


def _strip_ticks(cells: list[Cell]) -> list[Tick]:
    """Steps along the strip: the first, the last, and some between."""
    if not cells:
        return []
    count = min(4, len(cells))
    chosen = [round(number * (len(cells) - 1) / max(count - 1, 1)) for number in range(count)]
    steps = [cells[i].first if i < len(cells) - 1 else cells[i].last for i in chosen]
    return [Tick(100 * (i + 0.5) / len(cells), f"{step:,}") for i, step in zip(chosen, steps, strict=True)]


def _place_of(cells: list[Cell], step: int | None) -> float | None:
    """Percent from the left, of the cell that holds a step."""
    for number, cell in enumerate(cells):
        if step is not None and cell.first <= step <= cell.last:
            return 100 * (number + 0.5) / len(cells)
    return None
