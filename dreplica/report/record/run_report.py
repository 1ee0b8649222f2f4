"""report.json and metrics.jsonl: what programs read of a run."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.state.progress import Position
from dreplica.training.events import EpochDone
from dreplica.training.seed_spread import Spread

SCHEMA = 2


@dataclass
class RunReport:
    """All that report.json says; filled as the run goes."""

    name: str
    folder: Path
    expect: str
    replicas: list[dict[str, Any]]
    seconds: float = 0.0
    steps_checked: int = 0
    verdict: Verdict | None = None
    epochs: list[EpochDone] = field(default_factory=list)
    fingerprints: list[dict[str, str]] = field(default_factory=list)
    spread: Spread | None = None
    distance: list[dict[str, Any]] = field(default_factory=list)
    """Epoch by epoch, how far replicas that have parted are from replica 0."""
    skipped: list[str] = field(default_factory=list)
    """Samples left out because they cannot be loaded (`data.on_error: skip`)."""
    warnings: list[str] = field(default_factory=list)
    resumed_from: int | None = None
    """The step from which an interrupted run went on."""
    last_step: int | None = None
    """The last one taken, after which `fingerprints` are; None if it has not come to that."""
    stopped_after: int | None = None
    """The step after which it was stopped on request."""
    skipped_checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """Checkpoints that could not be restored: name, replica, code and reason of each."""

    def first_differing_result(self) -> tuple[int, str, list[float]] | None:
        """The first epoch in which replicas report other numbers: the epoch, which number, and each replica's."""
        for done in self.epochs:
            for part, numbers in (("training", done.train), ("validation", done.val)):
                for name, values in numbers.items():
                    if len({repr(value) for value in values}) > 1:
                        return done.epoch, f"{part} {name}", values
        return None

    def as_dict(self) -> dict[str, Any]:
        """JSON values, in the order of the schema."""
        return {
            "schema": SCHEMA,
            "run": {
                "name": self.name,
                "folder": str(self.folder),
                "seconds": round(self.seconds, 1),
                "resumed_from": self.resumed_from,
                "last_step": self.last_step,
                "stopped_after": self.stopped_after,
                "skipped_checkpoints": self.skipped_checkpoints,
            },
            "expect": self.expect,
            "replicas": self.replicas,
            "steps_checked": self.steps_checked,
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "divergence": None
            if self.verdict is None or not self.verdict.stage_groups
            else {"stage_groups": self.verdict.stage_groups, "path": self.verdict.path},
            "epochs": [epoch.as_dict() for epoch in self.epochs],
            "fingerprints": [
                {"replica": replica_id, **digests} for replica_id, digests in enumerate(self.fingerprints)
            ],
            "spread": None if self.spread is None else self.spread.as_dict(),
            "distance": self.distance,
            "skipped": {"count": len(self.skipped), "samples": self.skipped},
            "warnings": self.warnings,
        }


def write_json(path: Path, value: Any) -> None:
    """Writes `value` whole or not at all: to a file beside it, flushed, renamed. Raises OSError.

    JSON has no word for numbers that are infinite or none: null stands for them.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_finite(value), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_metrics(path: Path, done: EpochDone) -> None:
    """Adds one epoch's line to metrics.jsonl."""
    line = {"step": done.step, **done.as_dict(), "seconds": round(done.seconds, 3)}
    line["images_per_second"] = round(done.images_per_second, 1)
    line["throughput"] = [round(value, 1) for value in done.throughput]
    line["timing"] = {phase: [round(value, 6) for value in values] for phase, values in done.timing.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[EpochDone]:
    """The epochs in metrics.jsonl.

    From the first line on that was cut off, or is none of an epoch's, they are taken out of the file.
    """
    if not path.exists():
        return []
    epochs: list[EpochDone] = []
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                epochs.append(_epoch_done(json.loads(line)))
            except (ValueError, LookupError, TypeError, AttributeError):
                break
            whole += len(line)
        file.truncate(whole)
    return epochs


def _epoch_done(row: dict[str, Any]) -> EpochDone:
    train, val = (
        {name: [math.nan if value is None else value for value in values] for name, values in row[part].items()}
        for part in ("train", "val")
    )
    position = Position(row["epoch"] + 1)
    return EpochDone(row["epoch"], row["step"], train, val, row["seconds"], row["images_per_second"], None, position)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
