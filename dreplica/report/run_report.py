"""report.json and metrics.jsonl: what programs read of a run."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreplica.agreement.verdict import Verdict
from dreplica.training.loop import EpochDone
from dreplica.training.spread import Spread

SCHEMA = 1


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
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, in the order of the schema."""
        return {
            "schema": SCHEMA,
            "run": {"name": self.name, "folder": str(self.folder), "seconds": round(self.seconds, 1)},
            "expect": self.expect,
            "replicas": self.replicas,
            "steps_checked": self.steps_checked,
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "epochs": [epoch.as_dict() for epoch in self.epochs],
            "fingerprints": [
                {"replica": replica_id, **digests} for replica_id, digests in enumerate(self.fingerprints)
            ],
            "spread": None if self.spread is None else self.spread.as_dict(),
            "distance": self.distance,
            "warnings": self.warnings,
        }


def write_json(path: Path, value: Any) -> None:
    """Writes `value` whole or not at all: to a file beside it, flushed, renamed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_metrics(path: Path, done: EpochDone) -> None:
    """Adds one epoch's line to metrics.jsonl."""
    line = {"step": done.step, **done.as_dict(), "seconds": round(done.seconds, 3)}
    line["images_per_second"] = round(done.images_per_second, 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
