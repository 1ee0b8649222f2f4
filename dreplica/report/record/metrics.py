"""Write and read `metrics.jsonl`, which holds one line per epoch."""

import json
import math
from pathlib import Path
from typing import Any

from dreplica.agreement.trace.json_file import finite
from dreplica.state.progress import Position
from dreplica.training.events import EpochDone

METRICS_NAME = "metrics.jsonl"


def append_metrics(path: Path, done: EpochDone) -> None:
    """Append the line of an epoch to `metrics.jsonl`."""
    line = {"step": done.step, **done.as_dict(), "seconds": round(done.seconds, 3)}
    line["images_per_second"] = round(done.images_per_second, 1)
    line["lr"] = done.lr
    line["throughput"] = [round(value, 1) for value in done.throughput]
    line["timing"] = {phase: [round(value, 6) for value in values] for phase, values in done.timing.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[EpochDone]:
    """Read the epochs in `metrics.jsonl` and truncate the file after the last valid line."""
    if not path.exists():
        return []
    epochs: list[EpochDone] = []
    num_bytes = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                epochs.append(_epoch_done(json.loads(line)))
            except (ValueError, LookupError, TypeError, AttributeError):
                break
            num_bytes += len(line)
        file.truncate(num_bytes)
    return epochs


def losses_not_finite(done: EpochDone) -> str | None:
    """Return a warning of losses that are infinite or NaN, or None if all are finite."""
    losses = {"training": done.train["loss"], "validation": done.val["loss"]}
    wrong = [f"{part} loss {values}" for part, values in losses.items() if not all(map(math.isfinite, values))]
    return f"epoch {done.epoch}: {wrong[0]} is not finite. Replicas agree, but do not learn." if wrong else None


def _epoch_done(row: dict[str, Any]) -> EpochDone:
    train, val = (
        {name: [math.nan if value is None else value for value in values] for name, values in row[part].items()}
        for part in ("train", "val")
    )
    position = Position(row["epoch"] + 1)
    return EpochDone(row["epoch"], row["step"], train, val, row["seconds"], row["images_per_second"], None, position)
