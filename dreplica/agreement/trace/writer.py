"""`trace.jsonl`: the recorded digests of a run, a header line and one line per checked step.

Nothing in it depends on time or place, so two runs that computed the same have the same trace, line for line.
"""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.errors import UsageError
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.stages import STAGES, Stage


class TraceWriter:
    """Writer of a trace, which flushes each line.

    An interrupted run resumes from a checkpoint, before its newest recorded step. Repeated steps are compared with the
    recorded lines and are not written again if they are equal.

    Args:
        path: Path of the file to append to, or None to write nothing.
        num_replicas: Number of replicas, for the header.
        num_lines: Number of existing lines to keep. The steps of later lines are repeated.
        tensors: Where the digests of individual tensors are recorded, or None.
        algorithm: Name of the hash functions of the digests, for the header.

    Raises:
        UsageError: If the existing digests are of another algorithm.

    Attributes:
        algorithm: Name of the hash functions of the digests.
        num_lines: Number of lines of the steps done so far.
        num_missing: Number of lines among the first `num_lines` that the file lacks.
        not_reproduced: The first repeated step that differs from its record, with the stage, or None.
    """

    def __init__(
        self,
        path: Path | None,
        num_replicas: int,
        num_lines: int = 0,
        tensors: TensorRecord | None = None,
        algorithm: str = ALGORITHM,
    ) -> None:
        self.algorithm = algorithm
        self.num_lines, self.num_missing = num_lines, 0
        self.not_reproduced: tuple[int, str] | None = None
        self._recorded: deque[str] = deque()
        self._file = None
        self._tensors = tensors
        if path is not None:
            _check_algorithm(path, algorithm)
            self._recorded, self.num_lines = _recorded_after(path, num_lines)
            self.num_missing = num_lines - self.num_lines
            self._file = path.open("a", encoding="utf-8")
        if self.num_lines == 0 and self._recorded:
            self._recorded.popleft()  # the header
            self.num_lines = 1
        elif self.num_lines == 0:
            self._write({"algorithm": algorithm, "torch": str(torch.__version__), "replicas": num_replicas})

    def step(self, step: int, epoch: int | None, agreed: bool, stages: Mapping[str, Stage]) -> None:
        """Record a checked step.

        Args:
            step: The training step.
            epoch: The epoch, from 1, or None.
            agreed: True if all replicas agreed.
            stages: This replica's digests.
        """
        digests = {name: stage.digest.hex() for name, stage in stages.items()}
        is_new = self._write({"step": step, "epoch": epoch, "agreed": agreed, "digests": digests})
        if self._tensors is not None and (is_new or step >= self._tensors.last_step):
            self._tensors.step(step, stages)

    def close(self) -> None:
        """Close the file and that of the tensors."""
        if self._file is not None:
            self._file.close()
        if self._tensors is not None:
            self._tensors.close()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> bool:
        """Write a line, and return False if it was recorded before."""
        if self._file is None:
            return False
        self.num_lines += 1
        if self._recorded:
            recorded = self._recorded.popleft()
            if recorded == json.dumps(line):
                return False
            self.not_reproduced = self.not_reproduced or (line["step"], _first_difference(json.loads(recorded), line))
            self._recorded.clear()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return True


def _check_algorithm(path: Path, algorithm: str) -> None:
    try:
        with path.open("rb") as file:
            recorded = json.loads(file.readline())["algorithm"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # no complete header: nothing to resume from
    if recorded != algorithm:
        raise UsageError(
            f"{str(path)!r} has digests of algorithm {recorded!r}, but this run computes {algorithm!r}, so they cannot "
            "be compared. Resume on the same kind of device, or start a new run with --run.resume never.",
            code="algorithms-differ",
            path=str(path),
            recorded=recorded,
            computed=algorithm,
        )


def _recorded_after(path: Path, num_lines: int) -> tuple[deque[str], int]:
    """Return the lines after the first `num_lines`, and how many of those first lines exist.

    The file is truncated at the first line that is incomplete or not one of a trace (after a power failure, the file
    may end in zeros).
    """
    recorded: deque[str] = deque()
    whole, found, diverged = 0, 0, False
    if not path.exists():
        return recorded, 0
    with path.open("rb+") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n") or (number >= num_lines and not _is_row(line)):
                break
            whole += len(line)
            found += number < num_lines
            diverged = diverged or b'"agreed": false' in line  # a fault need not occur again, so stop comparing there
            if number >= num_lines and not diverged:
                recorded.append(line.decode().rstrip("\n"))
        file.truncate(whole)
    return recorded, found


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and ("algorithm" in row or ("step" in row and isinstance(row.get("digests"), dict)))


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    if one["step"] != other["step"]:
        return "step"
    stages = (stage for stage in STAGES if one["digests"].get(stage) != other["digests"].get(stage))
    return next(stages, "agreed")
