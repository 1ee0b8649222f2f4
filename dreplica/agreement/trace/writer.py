"""trace.jsonl: the recorded digests of a run, one line per checked step, behind a header line.

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
    """Writes a trace, each line flushed as it comes; with no path, writes nothing.

    An interrupted run that goes on has recorded more than it goes on from. What it comes to again is compared with
    what was recorded, and not written twice.

    Args:
        path: of the file; appended to.
        num_replicas: for the header.
        num_lines: of the lines that are there already, those of what is not done again.
        tensors: where the digests of single tensors are recorded beside it; None: nowhere.
        algorithm: of the digests, for the header.

    Raises UsageError if the digests that are there already are of another algorithm.

    Attributes:
        algorithm: as given.
        num_lines: lines of what has been done so far.
        num_missing: of those that should be there already, how many are not.
        not_reproduced: the first step, with its stage, that came out otherwise than it had been recorded; None if none
            has.
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
            self._recorded.popleft()  # its header
            self.num_lines = 1
        elif self.num_lines == 0:
            self._write({"algorithm": algorithm, "torch": str(torch.__version__), "replicas": num_replicas})

    def step(self, step: int, epoch: int | None, agreed: bool, stages: Mapping[str, Stage]) -> None:
        """A checked step: whether all replicas agreed, and this replica's digest of every stage."""
        digests = {name: stage.digest.hex() for name, stage in stages.items()}
        is_new = self._write({"step": step, "epoch": epoch, "agreed": agreed, "digests": digests})
        if self._tensors is not None and (is_new or step >= self._tensors.last_step):
            self._tensors.step(step, stages)

    def close(self) -> None:
        """Closes the file, and that of the tensors."""
        if self._file is not None:
            self._file.close()
        if self._tensors is not None:
            self._tensors.close()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> bool:
        """Whether the line was not there yet."""
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
        return  # no header, or none that is whole: nothing to go on from
    if recorded != algorithm:
        raise UsageError(
            f"{str(path)!r} has digests of algorithm {recorded!r}, and this run's are of {algorithm!r}: they would "
            "differ whatever the run did. Go on where it began, on the same kind of device, or begin anew with "
            "--run.resume never."
        )


def _recorded_after(path: Path, num_lines: int) -> tuple[deque[str], int]:
    """The lines after the first `num_lines`, and how many of these there are.

    From the first one on that was cut off in mid-line, or is none of a trace's (a host that went down may leave zeros),
    they are taken out of the file.
    """
    recorded: deque[str] = deque()
    whole, found, parted = 0, 0, False
    if not path.exists():
        return recorded, 0
    with path.open("rb+") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n") or (number >= num_lines and not _is_row(line)):
                break
            whole += len(line)
            found += number < num_lines
            parted = parted or b'"agreed": false' in line  # what came of a fault is not to come again
            if number >= num_lines and not parted:
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
