"""Reading of a recorded trace, line by line.

A trace may have a million lines, and its run may have been killed in the middle of one.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dreplica.agreement.trace.line import GENERATORS, Key, Line, Order
from dreplica.agreement.trace.line_format import LONGEST_HEADER, parse_header, read_lines, unusable
from dreplica.agreement.trace.tensor_digests import find_stages
from dreplica.state.fingerprint.stage import Stage

TRACE_NAME, TENSORS_NAME = "trace.jsonl", "tensors.bin"

_PASS_RUN = "Pass the folder of a run, or its trace."


class Trace:
    """The recorded digests of a run, read from its run folder.

    ```python
    trace = dreplica.Trace("runs/a")
    for line in trace.lines():
        print(line.key, line.agreed, trace.digests(line)["weights"])
    ```

    Args:
        path: Path of the run folder, or of its `trace.jsonl`.

    Raises:
        UsageError: If the file does not exist, cannot be read or is not a trace. The message names it.

    Attributes:
        path: Path of the trace file.
        algorithm: Name of the hash functions of its digests. Only digests of the same algorithm can be compared.
        torch_version: The version of torch that the run used.
        num_replicas: Number of replicas of the run.
        axes: Names of the axes of its lines' coordinates. Empty unless ranks hold shards.
        last_key: The newest step or evaluation, or (-1, False). Known after all lines were read.
        is_cut_off: True if the last line is incomplete and therefore skipped. Known after all lines were read.
        diverged_at: The first step at which the run's replicas had diverged, or None. Known after all lines were read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / TRACE_NAME if path.is_dir() else path
        self.last_key: Key = (-1, False)
        self.is_cut_off = False
        self.diverged_at: int | None = None
        self._again: list[tuple[int, Order]] = []
        if self.path.exists() and not self.path.is_file():
            raise unusable(self.path, "is not a regular file", "Copy it to one first, because it is read twice.")
        try:
            with self.path.open("rb") as file:
                self._header = parse_header(file.readline(LONGEST_HEADER), self.path)
        except FileNotFoundError:
            what = f"contains no {TRACE_NAME}" if path.is_dir() else "does not exist"
            raise unusable(path, what, _PASS_RUN, code="trace-missing") from None
        except OSError as error:
            raise unusable(self.path, f"cannot be read ({error.strerror})", "Pass a readable file.") from None
        self.algorithm, self.torch_version = self._header.algorithm, self._header.torch_version
        self.num_replicas, self.axes = self._header.num_replicas, self._header.axes

    def lines(self) -> Iterator[Line]:
        """Yield the recorded steps and evaluations in order.

        A run may have resumed from before its newest recorded step, if its replicas had diverged or a repeated step
        differed from the record. Such steps have several lines. The first pass over all lines yields each of them.
        Later passes yield only the newest line of each step.

        Raises:
            UsageError: If a line is damaged.
        """
        last: Order = (-1, 0, ())
        newest: Key = (-1, False)
        last_key = newest
        diverged_at: int | None = None
        again: list[tuple[int, Order]] = []
        for number, line in enumerate(self._parsed()):
            order = line.order
            if order <= last:
                again.append((number, order))
                newest = max(newest, last_key)
            last, last_key = order, line.key
            if self._again and any(at > number and first <= order for at, first in self._again):
                continue
            if not line.agreed and diverged_at is None:
                diverged_at = line.key[0]
            yield line
        self.last_key, self.diverged_at, self._again = max(newest, last_key), diverged_at, again

    def read_through(self) -> None:
        """Read all lines, to set the attributes that are known only then."""
        for _ in self.lines():
            pass
        if self._again:
            for _ in self.lines():
                pass

    @property
    def first_repeated(self) -> int | None:
        """The first step with several lines, or None. Known after all lines were read."""
        return min((order[0] for _, order in self._again), default=None)

    def is_uncertain(self, line: Line) -> bool:
        """Return True if the process that recorded a line may not know which generators were drawn from before.

        That is a process that resumed. Nor do the lines of format 1 say which generators were drawn from.
        """
        return self._uncertain_from is not None and line.key >= self._uncertain_from

    @cached_property
    def _uncertain_from(self) -> Key | None:
        """The first line of a process that resumed: it begins after step 0, or has forgotten what was drawn from."""
        if self._header.format == 1:
            return 0, False
        drawn: set[str] | None = None
        for line in self._parsed():
            if line.key == (0, False):
                drawn = set()
            if drawn is None or drawn.intersection(line.not_drawn):
                return line.key
            drawn.update(name for name in GENERATORS if name not in line.not_drawn)
        return None

    def num_lines_until(self, step: int) -> int:
        """Return how many lines a run keeps that resumes after a step.

        Args:
            step: The number of steps done.

        Returns:
            The number of lines up to the last one of this step or of an earlier one, header and evaluations included.
        """
        return max((number for number, line in enumerate(self._parsed(), start=2) if line.key[0] <= step), default=1)

    def digests(self, line: Line) -> dict[str, str]:
        """Return the digests of a line.

        Returns:
            Stage name to 32 hex digits.
        """
        return {stage: digest.hex() for stage, digest in line.by_stage().items()}

    def tensors(self, line: Line) -> dict[str, Stage] | None:
        """Return the digests of the individual tensors of a line.

        Returns:
            Stage name to its entries' digests, or None if the run did not record them
            (`--agreement.record tensors`).

        Raises:
            UsageError: If they were recorded, and the record is damaged.
        """
        step = line.key[0]
        recorded = (self.digests(each) for each in self._parsed() if each.key[0] == step)
        return find_stages(self.path.with_name(TENSORS_NAME), step, self.digests(line), recorded)

    def _parsed(self) -> Iterator[Line]:
        """Yield the complete lines in the order of the file."""
        with self.path.open("rb") as file:
            file.readline()
            for each in read_lines(file, self._header, self.path):
                if each is None:
                    self.is_cut_off = True
                else:
                    yield each[1]
