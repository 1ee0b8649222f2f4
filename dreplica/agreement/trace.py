"""trace.jsonl: the recorded digests of a run, one line per checked step, behind a header line.

Nothing in it depends on time or place, so two runs that computed the same have the same trace, line for line.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dreplica.agreement.fingerprint import ALGORITHM
from dreplica.agreement.stages import Stage


class Trace:
    """Writes a trace, each line flushed as it comes; with no path, writes nothing."""

    def __init__(self, path: Path | None, num_replicas: int) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self._write({"algorithm": ALGORITHM, "torch": str(torch.__version__), "replicas": num_replicas})

    def step(self, step: int, epoch: int | None, agreed: bool, stages: Mapping[str, Stage]) -> None:
        """A checked step: whether all replicas agreed, and this replica's digest of every stage."""
        digests = {name: stage.digest.hex() for name, stage in stages.items()}
        self._write({"step": step, "epoch": epoch, "agreed": agreed, "digests": digests})

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
