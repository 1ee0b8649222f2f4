"""`trace.jsonl`: the recorded digests of a run, a header line and one line per checked step.

Nothing in it depends on time or place, so two runs that computed the same have the same trace, line for line.
"""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from dreplica.agreement.trace.comparison import is_undrawn_difference
from dreplica.agreement.trace.line import GENERATORS, Line
from dreplica.agreement.trace.line_format import (
    LONGEST_HEADER,
    Header,
    content_of,
    encode_content,
    parse_header,
    read_lines,
    seal,
    unusable,
)
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.stages import STAGES, Stage

_RECORD_ANEW = "To record into a new folder, pass another record= (in the trainer: --run.resume never)."


class TraceWriter:
    """Writer of a trace, which flushes each line.

    An interrupted run resumes from a checkpoint, before its newest recorded step. Repeated steps are compared with the
    recorded lines and are not written again if they are equal. A trace of an older format is continued in that format.

    Args:
        path: Path of the file to append to, or None to write nothing.
        num_replicas: Number of replicas, for the header.
        num_lines: Number of existing lines to keep, the header included. The steps of later lines are repeated.
        tensors: Where the digests of individual tensors are recorded, or None.
        algorithm: Name of the hash functions of the digests, for the header.
        axes: Names of the axes of coordinates, for the header. Empty unless ranks hold shards.

    Raises:
        UsageError: If the existing file is damaged, is not a trace, or has digests of another algorithm.

    Attributes:
        algorithm: Name of the hash functions of the digests.
        num_lines: Number of lines of the steps done so far.
        num_missing: Number of lines among the first `num_lines` that the file lacks.
        not_reproduced: The first repeated step that differs from its record, with the stage, or None.
        not_drawn: Of the generators "python" and "numpy", those that were not drawn from according to the kept lines.
    """

    def __init__(
        self,
        path: Path | None,
        num_replicas: int,
        num_lines: int = 0,
        tensors: TensorRecord | None = None,
        algorithm: str = ALGORITHM,
        axes: Sequence[str] = (),
    ) -> None:
        self.algorithm = algorithm
        self.num_lines, self.num_missing = num_lines, 0
        self.not_reproduced: tuple[int, str] | None = None
        self.not_drawn: tuple[str, ...] = GENERATORS
        self._path, self._has_failed = path, False
        self._axes = tuple(axes)
        self._evaluated_step = -1
        self._evaluations: Counter[tuple[int, ...] | None] = Counter()
        self._header = Header(algorithm, str(torch.__version__), num_replicas, axes=self._axes)
        self._last_check = self._header.seed
        self._resumed = num_lines > 0
        self._recorded: deque[tuple[bytes, Line]] = deque()
        self._file: BinaryIO | None = None
        self._tensors = tensors
        if path is not None:
            self._open(path, num_lines)

    def _open(self, path: Path, num_lines: int) -> None:
        try:
            has_header = path.exists() and self._read_existing(path, num_lines)
            self._file = path.open("ab")
            if not has_header:
                self.num_lines, self.num_missing = 1, num_lines
                self._file.write(self._header.encode())
                self._file.flush()
        except BaseException:
            self.close()
            raise

    def step(
        self,
        step: int,
        epoch: int | None,
        agreed: bool,
        stages: Mapping[str, Stage],
        *,
        is_evaluation: bool = False,
        coordinate: tuple[int, ...] | None = None,
        not_drawn: Collection[str] = (),
    ) -> None:
        """Record a checked step.

        Args:
            step: The training step.
            epoch: The epoch, from 1, or None.
            agreed: True if all replicas agreed.
            stages: This replica's digests.
            is_evaluation: True for an evaluation that follows the step. There may be several.
            coordinate: The coordinate of the shard, an integer for each of the axes, or None. A step with several
                coordinates is recorded once for each of them, in ascending order.
            not_drawn: Of the generators "python" and "numpy", those that were not drawn from since the run began.

        Raises:
            OSError: If the step cannot be written.
        """
        if not is_evaluation or step != self._evaluated_step:
            self._evaluated_step = step
            self._evaluations.clear()
        self._evaluations[coordinate] += is_evaluation
        line = Line(
            (step, is_evaluation),
            epoch,
            agreed,
            tuple(stages),
            b"".join(stage.digest for stage in stages.values()),
            tuple(name for name in GENERATORS if name in not_drawn),
            coordinate or None,
            max(self._evaluations[coordinate], 1),
        )
        try:
            is_new = self._write(line)
            if self._tensors is not None and (is_new or step >= self._tensors.last_step):
                self._tensors.step(step, stages)
        except OSError as error:  # such as a full disk. The error of a write does not name the file
            self._has_failed = True
            raise OSError(error.errno, f"cannot record step {step}: {error.strerror}", str(self._path)) from None

    def close(self) -> None:
        """Close the file and that of the tensors."""
        # After a failed write, closing tries it again. The error was raised before.
        with contextlib.suppress(*[OSError] * self._has_failed):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(*[OSError] * self._has_failed):
            if self._tensors is not None:
                self._tensors.close()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _write(self, line: Line) -> bool:
        """Write a line, and return False if it was recorded before."""
        if self._file is None:
            return False
        self.num_lines += 1
        content = encode_content(self._header, line)
        if self._recorded:
            recorded, recorded_line = self._recorded.popleft()
            if recorded == content or (self._resumed and is_undrawn_difference(line, recorded_line)):
                return False
            self.not_reproduced = self.not_reproduced or (line.key[0], _first_difference(recorded_line, line))
            self._recorded.clear()
        whole, self._last_check = seal(self._header, content, self._last_check)
        self._file.write(whole)
        self._file.flush()
        return True

    def _read_existing(self, path: Path, num_lines: int) -> bool:
        """Read the lines that the file has, and return False if it has no header.

        The file is truncated at a last line that is incomplete or, after a power failure, was never written.

        Raises:
            UsageError: As the class does.
        """
        if not path.is_file():
            raise unusable(path, "is not a regular file", "Move it away, or pass another folder.")
        with path.open("rb") as file:
            raw = file.readline(LONGEST_HEADER)
            if not raw.endswith(b"\n") and len(raw) < LONGEST_HEADER:
                os.truncate(path, 0)
                return False
            self._header = parse_header(raw, path)
            _check_header(self._header, self.algorithm, self._axes, path)
            self._last_check, end, self.num_lines = self._header.seed, len(raw), 1
            num_lines, diverged = max(num_lines, 1), False
            for each in read_lines(file, self._header, path):
                if each is None:
                    os.truncate(path, end)
                    break
                raw, line, self._last_check = each
                end += len(raw)
                diverged = diverged or not line.agreed  # a fault need not occur again, so stop comparing there
                if self.num_lines < num_lines:
                    self.num_lines += 1
                    self.not_drawn = line.not_drawn
                elif not diverged:
                    self._recorded.append((content_of(self._header, raw), line))
            self.num_missing = num_lines - self.num_lines
        return True


def _check_header(header: Header, algorithm: str, axes: Sequence[str], path: Path) -> None:
    """Raise UsageError if a run cannot append to a trace with this header."""
    recorded: Sequence[str] | str
    for what, recorded, computed in (("algorithm", header.algorithm, algorithm), ("axes", header.axes, tuple(axes))):
        if recorded != computed:
            raise unusable(
                path,
                f"has digests of {what} {recorded!r}, but this run computes {computed!r}, so they cannot be compared",
                f"Resume on the same kind of device. {_RECORD_ANEW}",
                code=f"{what}-differ" if what == "axes" else "algorithms-differ",
                recorded=recorded,
                computed=computed,
            )
    if missing := [stage for stage in STAGES if stage not in header.stages]:
        what = f"has no place for the stages {', '.join(missing)}, since an older release began it"
        raise unusable(path, what, _RECORD_ANEW, code="older-trace")


def _first_difference(recorded: Line, line: Line) -> str:
    """Return the first stage in which a line differs from its record, or what else differs."""
    if recorded.order != line.order:
        return "step"
    one, other = recorded.by_stage(), line.by_stage()
    stages = (stage for stage in STAGES if one.get(stage) != other.get(stage))
    return next(stages, "agreed")
