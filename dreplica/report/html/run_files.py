"""Read a run folder, complete or not, for its page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from dreplica.agreement.trace.report_records import EpochRecord
from dreplica.agreement.trace.run_report import REPORT_NAME, ReportError, RunReport
from dreplica.errors import UsageError
from dreplica.report.html import file_schemas as shapes
from dreplica.report.html.trace_summary import TraceSummary, read_trace

_FILES = (REPORT_NAME, "config.yaml", "manifest.json", "metrics.jsonl", "trace.jsonl")


@dataclass
class RunFiles:
    """The content of a run folder. What a file does not provide is empty, and `problems` says why."""

    folder: Path
    report: RunReport | None
    """The report, or None if there is none or if the run has resumed since it was written."""
    config_text: str
    config: dict[str, Any]
    manifests: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    """Rows of `metrics.jsonl`, one per epoch."""
    trace: TraceSummary
    last_written: datetime
    """Modification time of the newest file."""
    has_checkpoint: bool
    problems: list[str] = field(default_factory=list)

    @property
    def num_replicas(self) -> int:
        """Number of replicas according to the first file that has it."""
        for rows in (self.report.replicas if self.report else [], self.manifests):
            if rows:
                return len(rows)
        return self.trace.num_replicas or 1

    @property
    def name(self) -> str:
        """Name of the run."""
        name = (self.report.run.name if self.report else "") or (self.config.get("run") or {}).get("name")
        return str(name or self.folder.resolve().name)


def read_run(folder: Path) -> RunFiles:
    """Read a run folder. The run may be in progress or have crashed.

    Raises:
        UsageError: The folder holds no file of a run.
    """
    present = [folder / name for name in _FILES if (folder / name).is_file()]
    if not present:
        raise UsageError(
            f"{str(folder)!r} is not a run folder: there is no {_FILES[0]}, nor any other file of a run. "
            "Pass the folder of a run, such as runs/digits.",
            code="no-run-folder",
            folder=str(folder),
        )
    problems: list[str] = []
    report = _read_report(folder, problems)
    config_text = _read(folder / "config.yaml", str, problems) or ""
    config = _read(folder / "config.yaml", _parse_yaml, problems)
    config = _valid_entries(config, shapes.CONFIG, "config.yaml", problems)
    manifests = _read(folder / "manifest.json", _parse_rows, problems)
    epochs = _read(folder / "metrics.jsonl", _parse_lines, problems)
    if not epochs and report is not None:
        epochs = [row for row in map(_epoch_row, report.epochs) if row is not None]
    trace = TraceSummary()
    try:
        trace = read_trace(folder / "trace.jsonl")
    except OSError as error:
        problems.append(f"trace.jsonl cannot be read: {error}")
    if trace.problem is not None:
        problems.append(trace.problem)
    if report is not None and _has_resumed(report, trace):
        problems.append(f"{REPORT_NAME} is of an earlier attempt: the run has resumed since and has not ended")
        report = None
    return RunFiles(
        folder,
        report,
        config_text,
        config or {},
        manifests or [],
        _by_epoch(epochs or []),
        trace,
        datetime.fromtimestamp(max(path.stat().st_mtime for path in present), UTC),
        any(folder.glob("checkpoints/step_*")),
        problems,
    )


def _by_epoch(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each epoch, sorted by epoch."""
    return sorted({row["epoch"]: row for row in rows}.values(), key=lambda row: row["epoch"])


def _read_report(folder: Path, problems: list[str]) -> RunReport | None:
    try:
        report, places = RunReport.read_valid_parts(folder)
    except ReportError as error:
        if error.code != "no-report":
            problems.append(str(error))
        return None
    problems += [_left_out(REPORT_NAME, place) for place in places]
    return report


def _epoch_row(record: EpochRecord) -> dict[str, Any] | None:
    """Return a record as a row of `metrics.jsonl`, or None if its values are not valid."""
    parts = {part: {key: record.values(part, key) for key in getattr(record, part)} for part in ("train", "val")}
    row = {"epoch": record.epoch, **parts}
    try:
        return dict(shapes.check(row, shapes.EPOCH))
    except ValueError:
        return None


def _has_resumed(report: RunReport, trace: TraceSummary) -> bool:
    """Return True if the run took further steps after its report was written."""
    ended, verdict = report.run.last_step, report.verdict
    if ended is None and verdict is not None and verdict.cause == "replica-lost" and verdict.step is not None:
        ended = verdict.step + 1  # rank 0 may have recorded a step that the reporting rank had not completed
    return ended is not None and trace.last_step is not None and trace.last_step > ended


def _read(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Any:
    """Return the parsed text of a file, or None if it is missing or cannot be parsed."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        line = f"{path.name} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        if line not in problems:
            problems.append(line)
        return None


def _valid_entries(
    content: dict[str, Any] | None, shape: TypeAdapter[Any], name: str, problems: list[str]
) -> dict[str, Any] | None:
    """Return the valid entries of a file and add the others to `problems`."""
    if content is None:
        return None
    kept, places = shapes.split_off_invalid(content, shape)
    problems += [_left_out(name, place) for place in places]
    return kept


def _left_out(name: str, place: str) -> str:
    return f"{name} has an invalid entry, which is not shown: {place}"


def _parse_yaml(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError("expected sections")
    return value


def _parse_rows(text: str) -> list[dict[str, Any]]:
    return list(shapes.check(json.loads(text), shapes.MANIFESTS))


def _parse_lines(text: str) -> list[dict[str, Any]]:
    """Parse complete lines only: a run in progress or a crash leaves a partial last line."""
    return [shapes.check(json.loads(line), shapes.EPOCH) for line in text.split("\n")[:-1]]
