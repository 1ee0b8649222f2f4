"""Render `report.html` from a run folder: one file that needs no network.

Jinja2 escapes every value. As a second barrier, the page's content security policy allows only its own script, by
digest, and no requests.
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
from dreplica.agreement.trace.report_records import SkippedSamples
from dreplica.report.html import environment_tables as tables
from dreplica.report.html import sections
from dreplica.report.html.charts import Tick
from dreplica.report.html.headline import duration, headline
from dreplica.report.html.run_files import RunFiles, read_run
from dreplica.report.html.trace_summary import Cell

log = logging.getLogger(__name__)

FILE_NAME = "report.html"

_TEMPLATES = Path(__file__).parent / "template"


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, completely or not at all.

    Returns:
        The path of the file.

    Raises:
        UsageError: The folder is not a run folder.
        OSError: The file cannot be written.
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
    """Return the page of a run."""
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    report = run.report
    seconds, steps = (report.run.seconds, report.steps_checked) if report else (None, None)
    devices = sorted({row.device for row in (report.replicas if report else []) if row.device})
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
        warnings=[*run.problems, *(report.warnings if report else [])],
        skipped=report.skipped if report else SkippedSamples(),
        coverage=report.coverage if report else None,
        trace=run.trace,
        strip_ticks=_strip_ticks(run.trace.cells),
        verdict_at=_place_of(run.trace.cells, report.verdict.step if report and report.verdict else None),
        expect=report.expect if report else None,
        grid=grid,
        grid_table=sections.grid_table(grid) if grid else None,
        path=sections.operator_path(run),
        spread=sections.spread_figure(run),
        charts=sections.training_charts(run),
        distances=sections.distance_charts(run),
        time=sections.time_bars(run),
        replicas=tables.replicas_table(run),
        environment=tables.environment_table(run),
        manifest=tables.manifest_table(run),
        distributions=tables.distributions_table(run),
        on_gpu=any((row.get("device") or {}).get("type") == "cuda" for row in run.manifests),
        group_name=sections.group_name,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        time_made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


@cache
def template() -> Template:
    """Return the template of the page, compiled once per process."""
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _strip_ticks(cells: list[Cell]) -> list[Tick]:
    """Return ticks for the first step, the last step and some between."""
    if not cells:
        return []
    count = min(4, len(cells))
    chosen = [round(number * (len(cells) - 1) / max(count - 1, 1)) for number in range(count)]
    steps = [cells[i].first if i < len(cells) - 1 else cells[i].last for i in chosen]
    return [Tick(100 * (i + 0.5) / len(cells), f"{step:,}") for i, step in zip(chosen, steps, strict=True)]


def _place_of(cells: list[Cell], step: int | None) -> float | None:
    """Return the position of a step's cell in percent from the left, or None if no cell has it."""
    for number, cell in enumerate(cells):
        if step is not None and cell.first <= step <= cell.last:
            return 100 * (number + 0.5) / len(cells)
    return None
