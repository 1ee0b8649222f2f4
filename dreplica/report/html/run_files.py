"""What is in a run folder, whole or not: the report is made of it alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from dreplica.errors import UsageError
from dreplica.report.html import file_schemas as shapes
from dreplica.report.html.trace_summary import TraceSummary, read_trace

_FILES = ("report.json", "config.yaml", "manifest.json", "metrics.jsonl", "trace.jsonl")


@dataclass
class RunFiles:
    """Everything that the report is made of. What a file does not give stays empty, and `problems` says why."""

    folder: Path
    report: dict[str, Any] | None
    """None where there is none (yet), or it is that of an earlier attempt at a run that has gone on since."""
    config_text: str
    config: dict[str, Any]
    manifests: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    trace: TraceSummary
    last_written: datetime
    """When the newest of the files was."""
    has_checkpoint: bool
    problems: list[str] = field(default_factory=list)

    @property
    def num_replicas(self) -> int:
        """As far as any of the files tells."""
        for rows in ((self.report or {}).get("replicas"), self.manifests):
            if rows:
                return len(rows)
        return int(self.trace.header.get("replicas", 1))

    @property
    def name(self) -> str:
        """The run's."""
        name = ((self.report or {}).get("run") or {}).get("name") or (self.config.get("run") or {}).get("name")
        return str(name or self.folder.resolve().name)


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder, that of a run in progress or a crashed one, too. Raises UsageError if it is none."""
    present = [folder / name for name in _FILES if (folder / name).is_file()]
    if not present:
        raise UsageError(
            f"RUN: {str(folder)!r} is not a run folder: there is no {_FILES[0]}, nor any other file of a run. "
            "Name one that a run has written to, such as runs/digits."
        )
    problems: list[str] = []
    report = _in_shape(_read(folder / "report.json", _parse_object, problems), shapes.REPORT, "report.json", problems)
    config_text = _read(folder / "config.yaml", str, problems) or ""
    config = _in_shape(_read(folder / "config.yaml", _parse_yaml, problems), shapes.CONFIG, "config.yaml", problems)
    manifests = _read(folder / "manifest.json", _parse_rows, problems)
    epochs = _read(folder / "metrics.jsonl", _parse_lines, problems) or (report or {}).get("epochs") or []
    trace = TraceSummary()
    try:
        trace = read_trace(folder / "trace.jsonl")
    except OSError as error:
        problems.append(f"trace.jsonl cannot be read: {error}")
    if report is not None and _went_on(report, trace):
        problems.append("report.json is that of an earlier attempt: the run has gone on since, and not yet ended")
        report = None
    return RunFiles(
        folder,
        report,
        config_text,
        config or {},
        manifests or [],
        by_epoch(epochs),
        trace,
        datetime.fromtimestamp(max(path.stat().st_mtime for path in present), UTC),
        any(folder.glob("checkpoints/step_*")),
        problems,
    )


def by_epoch(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each epoch, in the order of epochs."""
    return sorted({row["epoch"]: row for row in rows}.values(), key=lambda row: row["epoch"])


def _went_on(report: dict[str, Any], trace: TraceSummary) -> bool:
    """Whether a run has taken further steps since its report was written."""
    verdict, run = report.get("verdict") or {}, report.get("run") or {}
    ended = run.get("last_step", run.get("stopped_after"))
    if ended is None and verdict.get("cause") == "replica-lost" and verdict.get("step") is not None:
        ended = verdict["step"] + 1  # rank 0 may have recorded a step that the one that tells had not completed
    return ended is not None and trace.last_step is not None and trace.last_step > ended


def _read(path: Path, parse: Any, problems: list[str]) -> Any:
    """None if there is no such file, or `parse` cannot make sense of its text."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        line = f"{path.name} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        if line not in problems:
            problems.append(line)
        return None


def _in_shape(
    content: dict[str, Any] | None, shape: TypeAdapter[Any], name: str, problems: list[str]
) -> dict[str, Any] | None:
    """What of it can be shown; where it is not what a run leaves, `problems` says so."""
    if content is None:
        return None
    kept, places = shapes.split_off_misshapen(content, shape)
    problems += [f"{name} is not what a run leaves, and that part is not shown: {place}" for place in places]
    return kept


def _parse_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def _parse_yaml(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError("it holds no sections")
    return value


def _parse_rows(text: str) -> list[dict[str, Any]]:
    return shapes.check(json.loads(text), shapes.MANIFESTS)


def _parse_lines(text: str) -> list[dict[str, Any]]:
    """Whole lines only: a last one may still be being written, or have been cut off."""
    return [shapes.check(json.loads(line), shapes.EPOCH) for line in text.split("\n")[:-1]]
