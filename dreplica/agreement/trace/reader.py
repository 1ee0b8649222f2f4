"""A recorded trace, read line by line: it may have a million, and its run may have ended in the middle of one."""

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

_AS_WRITTEN = re.compile(
    rb'\{"step": (\d{1,18}), "epoch": (\d{1,18}|null), "agreed": (true|false), "digests": (\{[^{}]*\})\}\n'
)

_LONGEST_HEADER = 100_000
"""Bytes: some other file may well be a single line."""

Key = tuple[int, bool]
"""A step, and whether it is the evaluation that follows it."""


class Line(NamedTuple):
    """A checked step."""

    key: Key
    epoch: int | None
    agreed: bool
    digests: bytes
    """JSON: stage to 32 hex digits. Equal bytes mean equal digests."""


class Start(NamedTuple):
    """A place between two lines behind the header."""

    num_bytes: int = 0
    num_lines: int = 0
    step: int = -1
    """Of the line before."""


class Trace:
    """The trace of a run, in a file.

    Raises UsageError, naming the file, if there is none or it is no trace.

    Args:
        path: of the file, or of its run folder.

    Attributes:
        path: of the file.
        algorithm, torch_version, num_replicas: as its header has them.

    What is known once all lines have been read:

    Attributes:
        last_key: of the newest step in it; (-1, False) if there is none.
        is_cut_off: whether its last line is not whole, and therefore not read.
        diverged_at: the first step at which its own replicas had parted; None if they agreed all along.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / TRACE_NAME if path.is_dir() else path
        self.last_key: Key = (-1, False)
        self.is_cut_off = False
        self.diverged_at: int | None = None
        self._again: list[tuple[int, Key]] = []
        if self.path.exists() and not self.path.is_file():
            raise UsageError(f"{str(self.path)!r} is no plain file, and a trace is read twice. Write it to one first.")
        try:
            with self.path.open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
            self.algorithm, self.torch_version = str(header["algorithm"]), str(header["torch"])
            self.num_replicas = int(header["replicas"])
        except FileNotFoundError:
            what = f"has no {TRACE_NAME}" if path.is_dir() else "is no folder and no file"
            raise UsageError(f"{str(path)!r} {what}. Name the folder of a run, or its trace.") from None
        except OSError as error:
            raise UsageError(f"{str(self.path)!r} cannot be read ({error.strerror}). Name another.") from None
        except (ValueError, LookupError, TypeError, OverflowError):
            raise UsageError(
                f"{str(self.path)!r} does not begin with the header of a trace. Name the folder of a run, or its trace."
            ) from None

    def lines(self, start: Start | None = None) -> Iterator[Line]:
        """The lines in order, from `start` on or from the first. Raises UsageError at one that is none.

        A run that was interrupted after its replicas had parted, or that did not come to what it had recorded, went on
        from an earlier step: once all lines have been read, only the last ones of such steps are given.
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
        """Reads all lines, for what can only be known then."""
        for _ in self.lines():
            pass
        if self._again:
            for _ in self.lines():
                pass

    @property
    def first_repeated(self) -> int | None:
        """The first step of which there are several lines; None if there is none."""
        return min((key[0] for _, key in self._again), default=None)

    def digests(self, line: Line) -> dict[str, str]:
        """The line's stages, each with its 32 hex digits. Raises UsageError if that is not what it holds."""
        try:
            return {str(stage): str(digest) for stage, digest in json.loads(line.digests).items()}
        except ValueError:
            raise UsageError(
                f"{str(self.path)!r}: the line of step {line.key[0]} holds no digests: {line.digests[:60]!r}. Take it "
                "out, or record again."
            ) from None

    def tensors(self, line: Line) -> dict[str, Stage] | None:
        """The digests of the line's single tensors, stage by stage; None where they have not been recorded."""
        return find_stages(self.path.with_name(TENSORS_NAME), line.key[0], self.digests(line))

    def _parsed(self, raw_lines: Iterable[bytes], start: Start) -> Iterator[Line]:
        """The whole lines."""
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
        """A line that another program has written, in its own spacing or order."""
        try:
            row: dict[str, Any] = json.loads(raw)
            digests = {str(stage): str(digest) for stage, digest in row["digests"].items()}
            return int(row["step"]), row["epoch"], bool(row["agreed"]), json.dumps(digests).encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UsageError(
                f"{str(self.path)!r}: line {number} is none of a trace: {raw[:60]!r}. Take it out, or record again."
            ) from None


def _is_only_a_batch(digests: bytes) -> bool:
    """What is recorded of an evaluation of independent replicas, whose predictions need not agree."""
    return digests.startswith(b'{"batch"') and digests.count(b":") == 1
