"""In what two runs differ that were made at different times or places: what they were given, and what they ran on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_CHANGES_NOTHING = {"run", "checkpoint", "agreement", "world.timeout", "train.epochs", "train.max_steps"}
"""Config sections and keys that no digest depends on: names, what is compared and kept, and how far a run goes."""
_NAMES_A_MACHINE = {"host", "device.index", "device.uuid", "device.shared"}
"""Manifest fields that say which of several machines or devices alike it was."""


@dataclass(frozen=True)
class RunDifference:
    """A config key or manifest field that two runs do not have alike."""

    field: str
    """Dotted."""
    one: Any
    other: Any
    matters: bool
    """Whether a digest can depend on it."""

    def __str__(self) -> str:
        return f"{self.field}: {show(self.one)} and {show(self.other)}"


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder holds besides the trace."""

    config: Mapping[str, Any] | None
    """The resolved config; None if it is not there or cannot be read."""
    manifests: Sequence[Mapping[str, Any]] | None
    """One per replica; None likewise."""
    verdict: Mapping[str, Any] | None
    """The report's; None likewise, or if the run has not ended."""
    final: Mapping[tuple[Any, str], str]
    """Of each replica's weights, buffers and optimizer at the end, 32 hex digits; empty likewise."""
    last_step: int | None
    """The step after which `final` is; the run may have gone on since. None if the report does not say."""
    missing: tuple[str, ...] = ()
    """The files that could not be read, and why."""


def read_run(folder: Path) -> RecordedRun:
    """What is there; a trace by itself, or a run that was killed, may lack any of it."""
    missing: list[str] = []

    def read(name: str, parse: Any, is_one: Callable[[Any], bool]) -> Any:
        try:
            content = parse((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            missing.append(f"there is no {name}")
        except (OSError, ValueError, yaml.YAMLError) as error:
            missing.append(f"{name} cannot be read ({error})")
        else:
            if is_one(content):
                return content
            missing.append(f"{name} is not what a run leaves")
        return None

    config = read("config.yaml", yaml.safe_load, lambda content: isinstance(content, dict))
    manifests = read("manifest.json", json.loads, _is_rows)
    report = read("report.json", json.loads, _is_report) or {}
    final = {
        (row.get("replica"), stage): digest
        for row in report.get("fingerprints") or []
        for stage, digest in row.items()
        if stage != "replica"
    }
    run = report.get("run") or {}
    last_step = run.get("last_step", run.get("stopped_after"))
    return RecordedRun(config, manifests, report.get("verdict"), final, last_step, tuple(missing))


def _is_rows(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(row, dict) for row in content)


def _is_report(content: Any) -> bool:
    if not isinstance(content, dict) or not _is_rows(content.get("fingerprints") or []):
        return False
    verdict, run = content.get("verdict"), content.get("run") or {}
    if not isinstance(run, dict) or not isinstance(run.get("last_step"), int | None):
        return False
    return verdict is None or (isinstance(verdict, dict) and "cause" in verdict)


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[RunDifference]:
    """The keys on which two resolved configs differ, in their own order."""
    here, there = dict(_leaves(one)), dict(_leaves(other))
    return [
        RunDifference(key, here.get(key), there.get(key), matters=not _is_one_of(key, _CHANGES_NOTHING))
        for key in [*here, *(key for key in there if key not in here)]
        if here.get(key) != there.get(key)
    ]


def manifest_differences(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[RunDifference]:
    """The fields on which two runs' manifests differ.

    The value that all replicas of a run have, or a list where they do not have the same. How many replicas there are
    makes no difference.
    """
    here, there = _values(one), _values(other)
    return [
        RunDifference(field, here.get(field), there.get(field), matters=field not in _NAMES_A_MACHINE)
        for field in [*here, *(field for field in there if field not in here)]
        if here.get(field) != there.get(field)
    ]


def show(value: Any) -> str:
    """As the user would write it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _values(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [dict(_leaves(manifest)) for manifest in manifests]
    values: dict[str, Any] = {}
    for field in dict.fromkeys(field for row in rows for field in row if field != "replica"):
        column = [row.get(field) for row in rows]
        values[field] = column[0] if all(value == column[0] for value in column) else column
    return values


def _leaves(value: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _is_one_of(key: str, names: set[str]) -> bool:
    """Whether the dotted key, or its section as a whole, is among `names`."""
    return key in names or key.partition(".")[0] in names
