"""Reading of a recorded trace, line by line.

A trace may have a million lines, and its run may have been killed in the middle of one.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dreplica.agreement.trace.tensor_digests import find_stages
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import Stage

TRACE_NAME, TENSORS_NAME = "trace.jsonl", "tensors.bin"

_PASS_RUN = "Pass the folder of a run, or its trace."

_AS_WRITTEN = re.compile(
    rb'\{"step": (\d{1,18}), "epoch": (\d{1,18}|null), "agreed": (true|false), "digests": (\{[^{}]*\})\}\n'
)

_LONGEST_HEADER = 100_000
"""Bytes read at most for the header. A file that is not a trace may be one long line."""

Key = tuple[int, bool]
"""A training step, and True for the evaluation that follows it."""


class Line(NamedTuple):
    """A checked step or evaluation."""

    key: Key
    """The training step, and True for the evaluation that follows it."""
    epoch: int | None
    """The epoch, from 1, or None if the run did not pass it."""
    agreed: bool
    """True if the run's replicas agreed."""
    digests: bytes
    """Stage to 32 hex digits, as JSON. Equal bytes mean equal digests. `Trace.digests` decodes it."""


class Start(NamedTuple):
    """A position between two lines after the header."""

    num_bytes: int = 0
    """Bytes between the header and this position."""
    num_lines: int = 0
    """Lines between the header and this position."""
    step: int = -1
    """The step of the line before this position."""


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
        self._again: list[tuple[int, Key]] = []
        if self.path.exists() and not self.path.is_file():
            raise _unreadable(self.path, "is not a regular file", "Copy it to one first, because it is read twice.")
        try:
            with self.path.open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
            self.algorithm, self.torch_version = str(header["algorithm"]), str(header["torch"])
            self.num_replicas = int(header["replicas"])
        except FileNotFoundError:
            what = f"contains no {TRACE_NAME}" if path.is_dir() else "does not exist"
            raise _unreadable(path, what, _PASS_RUN, code="trace-missing") from None
        except OSError as error:
            raise _unreadable(self.path, f"cannot be read ({error.strerror})", "Pass a readable file.") from None
        except (ValueError, LookupError, TypeError, OverflowError):
            raise _unreadable(self.path, "does not begin with the header of a trace", _PASS_RUN) from None

    def lines(self, start: Start | None = None) -> Iterator[Line]:
        """Yield the recorded steps and evaluations in order.

        A run may have resumed from before its newest recorded step, if its replicas had diverged or a repeated step
        differed from the record. Such steps have several lines. The first pass over all lines yields each of them.
        Later passes yield only the newest line of each step.

        Args:
            start: Where to begin, by default at the first line.

        Raises:
            UsageError: If a line is not one of a trace.
        """
        start = start or Start()
        last = newest = (start.step, False)
        diverged_at: int | None = None
        again: list[tuple[int, Key]] = []
        with self.path.open("rb") as file:
            file.readline()
            file.seek(start.num_bytes, os.SEEK_CUR)
            for number, line in enumerate(self._parsed(file, start), start=start.num_lines):
                if line.key <= last:
                    again.append((number, line.key))
                last = line.key
                newest = max(newest, last)
                if self._again and any(at > number and key <= last for at, key in self._again):
                    continue
                if not line.agreed and diverged_at is None:
                    diverged_at = last[0]
                yield line
        self.last_key, self.diverged_at, self._again = newest, diverged_at, again

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
        return min((key[0] for _, key in self._again), default=None)

    def digests(self, line: Line) -> dict[str, str]:
        """Return the digests of a line.

        Returns:
            Stage name to 32 hex digits.

        Raises:
            UsageError: If the line holds no digests.
        """
        try:
            return {str(stage): str(digest) for stage, digest in json.loads(line.digests).items()}
        except ValueError:
            what = f"has no digests in the line of step {line.key[0]}: {line.digests[:60]!r}"
            raise _unreadable(self.path, what, "Remove the line, or record the run again.") from None

    def tensors(self, line: Line) -> dict[str, Stage] | None:
        """Return the digests of the individual tensors of a line.

        Returns:
            Stage name to its entries' digests, or None if the run did not record them
            (`--agreement.record tensors`).
        """
        return find_stages(self.path.with_name(TENSORS_NAME), line.key[0], self.digests(line))

    def _parsed(self, raw_lines: Iterable[bytes], start: Start) -> Iterator[Line]:
        """Yield the complete lines."""
        before = start.step
        for number, raw in enumerate(raw_lines, start=start.num_lines + 2):
            if not raw.endswith(b"\n"):
                self.is_cut_off = True
                return
            found = _AS_WRITTEN.fullmatch(raw)
            if found is None:
                step, epoch, agreed, digests = self._parse(raw, number)
            else:
                given = found.groups()
                step, epoch, digests = int(given[0]), None if given[1] == b"null" else int(given[1]), given[3]
                agreed = given[2] == b"true"
            is_evaluation = b'"predictions"' in digests or (step == before and _is_only_a_batch(digests))
            before = step
            yield Line((step, is_evaluation), epoch, agreed, digests)

    def _parse(self, raw: bytes, number: int) -> tuple[int, int | None, bool, bytes]:
        """Parse a line that another program wrote, with other spacing or order."""
        try:
            row: dict[str, Any] = json.loads(raw)
            digests = {str(stage): str(digest) for stage, digest in row["digests"].items()}
            return int(row["step"]), row["epoch"], bool(row["agreed"]), json.dumps(digests).encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            what = f"has an invalid line {number}: {raw[:60]!r}"
            raise _unreadable(self.path, what, "Remove the line, or record the run again.") from None


def _unreadable(path: Path, what: str, fix: str, code: str = "trace-invalid") -> UsageError:
    return UsageError(f"{str(path)!r} {what}. {fix}", code=code, path=str(path))


def _is_only_a_batch(digests: bytes) -> bool:
    """Return True for an evaluation of independent replicas, whose predictions need not agree."""
    return digests.startswith(b'{"batch"') and digests.count(b":") == 1
