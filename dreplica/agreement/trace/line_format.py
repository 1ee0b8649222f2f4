"""The lines of `trace.jsonl`.

Format 2 begins with a header, a JSON object:

    {"format":2,"algorithm":"xxh3-128/1","torch":"2.14.1","replicas":2,"stages":["indices",...],"check":"..."}

Each further line is a row, a JSON array without spaces:

    [step,epoch,flags,stages,"digests and check"]
    [step,epoch,flags,stages,[coordinate],"digests and check"]

- `epoch` counts from 1, or is null.
- `flags` is a sum: 1 if the replicas diverged, 2 for an evaluation that follows the step, 4 if nothing was drawn from
  Python's generator since the run began, 8 if nothing was drawn from NumPy's, 16 for each earlier
  evaluation of the same step.
- `stages` is a sum of 2^i, where i is the position of the stage in the header.
- `coordinate` is present where ranks hold different state by design (shards): one integer for each of the header's
  `axes`. Such a step has a row for each distinct coordinate.
- `digests` holds the 16 bytes of each stage, in the order of the header, in base64 without padding.
- The last 11 characters of the text are the check digest: 8 bytes of XXH3 in base64 without padding, over the check
  digest of the line before and the bytes of this line up to the check digest. The first row continues from a digest of
  the header's format, algorithm, stages and axes. A changed bit, a missing line, another order and a line of another
  trace all break this chain.

Nothing in a row depends on time, place or the number of replicas: equal runs have equal rows.

Format 1, which is still read and appended to, has a header without `format`, and rows without check digests:

    {"step": 1, "epoch": 1, "agreed": true, "digests": {"indices": "32 hex digits", ...}}
"""

import json
import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dreplica.agreement.trace.line import GENERATORS, Line
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import STAGES

FORMAT = 2
LONGEST_HEADER = 100_000
"""Bytes read at most for the header. A file that is not a trace may be one long line."""
_LONGEST_LINE = 2**20
"""Bytes read at once. A line of a trace is much shorter."""

_DIVERGED, _EVALUATION, _NOT_DRAWN = 1, 2, (4, 8)
_NEXT_EVALUATION = 16
_FLAGS = tuple(
    (
        bool(flags & _EVALUATION),
        not flags & _DIVERGED,
        tuple(name for bit, name in zip(_NOT_DRAWN, GENERATORS, strict=True) if flags & bit),
    )
    for flags in range(_NEXT_EVALUATION)
)
"""What each sum of flags means: evaluation, agreed, and the generators that were not drawn from."""
_ROW = re.compile(
    rb'\[(\d{1,18}),(\d{1,18}|null),(\d{1,9}),(\d{1,9})(?:,\[(-?\d{1,18}(?:,-?\d{1,18})*)\])?,"([A-Za-z0-9+/]*)'
)
"""A row up to its check digest."""
_HEADER_CHECK = b',"check":"'
_END = b'"]\n'
_CHECK_LENGTH = 11
_ROW_END = _CHECK_LENGTH + len(_END)
"""Length of the check digest and what follows it, at the end of a row."""


@dataclass(frozen=True)
class Header:
    """The header of a trace."""

    algorithm: str
    """The name of the hash functions of the digests."""
    torch_version: str
    """The version of torch that the run used."""
    num_replicas: int
    """The number of replicas of the run."""
    stages: tuple[str, ...] = STAGES
    """All stages that rows may have."""
    axes: tuple[str, ...] = ()
    """The names of the axes of coordinates."""
    format: int = FORMAT
    """The format of the rows, 1 or 2."""

    def encode(self) -> bytes:
        """Return the header's line."""
        row: dict[str, Any] = {"algorithm": self.algorithm, "torch": self.torch_version, "replicas": self.num_replicas}
        if self.format == 1:
            return json.dumps(row).encode() + b"\n"
        row = {"format": self.format, **row, "stages": self.stages}
        if self.axes:
            row["axes"] = self.axes
        content = json.dumps(row, separators=(",", ":"))[:-1].encode()
        return b'%s%s%s"}\n' % (content, _HEADER_CHECK, _check(b"", content))

    @cached_property
    def seed(self) -> bytes:
        """What the first row continues from."""
        if self.format == 1:
            return b"-1"
        return _check(b"", json.dumps([self.format, self.algorithm, self.stages, self.axes]).encode())


def parse_header(raw: bytes, path: Path) -> Header:
    """Return the header that a line holds.

    Args:
        raw: The first line of the file.
        path: The path of the file, for the message.

    Raises:
        UsageError: If the line is not the header of a trace, is damaged, or has a newer format.
    """
    # A single changed bit leaves one of the two in place.
    is_checked = raw.startswith(b'{"format":') or _HEADER_CHECK in raw
    content, _, end = raw.rpartition(_HEADER_CHECK)
    if is_checked and end != _check(b"", content) + b'"}\n':
        raise damaged_line(path, 1)
    try:
        row = json.loads(raw)
        header = Header(
            str(row["algorithm"]),
            str(row["torch"]),
            int(row["replicas"]),
            tuple(row.get("stages", STAGES)),
            tuple(row.get("axes", ())),
            int(row["format"]) if is_checked else 1,
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        fix = "Pass the folder of a run, or its trace."
        raise unusable(path, "does not begin with the header of a trace", fix) from None
    if header.format > FORMAT:
        what = f"has format {header.format}, expected {FORMAT} or lower"
        raise unusable(path, what, "Upgrade dreplica.", code="newer-trace")
    return header


def encode_content(header: Header, line: Line) -> bytes:
    """Return the bytes of a line without its check digest.

    Args:
        header: The header of the trace.
        line: The line. Format 1 has neither `not_drawn` nor a coordinate, and one evaluation for each step.
    """
    step, is_evaluation = line.key
    if header.format == 1:
        digests = {name: digest.hex() for name, digest in line.by_stage().items()}
        return json.dumps({"step": step, "epoch": line.epoch, "agreed": line.agreed, "digests": digests}).encode()
    flags = _DIVERGED * (not line.agreed) + _EVALUATION * is_evaluation
    flags += _NEXT_EVALUATION * (line.number - 1)
    flags += sum(bit for bit, name in zip(_NOT_DRAWN, GENERATORS, strict=True) if name in line.not_drawn)
    by_stage = line.by_stage()
    mask = sum(1 << i for i, name in enumerate(header.stages) if name in by_stage)
    content = b"".join(by_stage[name] for name in header.stages if name in by_stage)
    row = [step, line.epoch, flags, mask, *([line.coordinate] if line.coordinate else [])]
    return b'%s,"%s' % (json.dumps(row, separators=(",", ":"))[:-1].encode(), _base64(content))


def seal(header: Header, content: bytes, before: bytes) -> tuple[bytes, bytes]:
    """Add the check digest to the content of a line.

    Args:
        header: The header of the trace.
        content: The bytes of the line without its check digest.
        before: What the line before returned, or the header's seed.

    Returns:
        The whole line, and what the next line continues from.
    """
    if header.format == 1:
        return content + b"\n", before
    check = _check(before, content)
    return b"%s%s%s" % (content, check, _END), check


def read_lines(file: BinaryIO, header: Header, path: Path) -> Iterator[tuple[bytes, Line, bytes] | None]:
    """Yield the complete lines after the header, and verify their check digests.

    Args:
        file: The open file, at the end of the header.
        header: The header.
        path: The path of the file, for the message.

    Yields:
        The line's bytes, what they hold, and what the next line continues from. None at the end of a file whose last
        line is incomplete or, after a power failure, was never written.

    Raises:
        UsageError: If a line is damaged.
    """
    before = header.seed
    for number, raw in enumerate(iter(partial(file.readline, _LONGEST_LINE), b""), start=2):
        if not raw.endswith(b"\n") and len(raw) < _LONGEST_LINE:
            yield None
            return
        try:
            line, before = _parse_1(raw, before) if header.format == 1 else _parse_2(raw, before, header.stages)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if _is_unwritten(raw) and all(map(_is_unwritten, iter(partial(file.read, _LONGEST_LINE), b""))):
                yield None
                return
            raise damaged_line(path, number) from None
        yield raw, line, before


def content_of(header: Header, raw: bytes) -> bytes:
    """Return the bytes of a complete line without its check digest."""
    return raw[:-1] if header.format == 1 else raw[:-_ROW_END]


def unusable(path: Path, what: str, fix: str, code: str = "trace-invalid", **fields: Any) -> UsageError:
    """Return the error for a trace that cannot be used.

    Args:
        path: The path of the file.
        what: What is wrong with it.
        fix: What the user can do.
        code: The stable identifier for programs.
        **fields: Further data of the error.
    """
    return UsageError(f"{str(path)!r} {what}. {fix}", code=code, path=str(path), **fields)


def damaged_line(path: Path, number: int) -> UsageError:
    """Return the error for a line that has changed since it was written.

    Args:
        path: The path of the trace.
        number: The number of the line, from 1.
    """
    keep = f"keep only the {number - 1} lines before it" if number > 1 else "record the run again"
    fix = f"Restore the file from a copy, or {keep}."
    return unusable(path, f"is damaged at line {number}", fix, code="damaged-trace", line=number)


def _is_unwritten(raw: bytes) -> bool:
    """Return True for bytes that a file system left where nothing was written before a power failure."""
    return not raw.strip(b"\0\n")


# Two equal traces are read in step, so the second one finds each line parsed.
@lru_cache(maxsize=4)
def _parse_2(raw: bytes, before: bytes, names: tuple[str, ...]) -> tuple[Line, bytes]:
    check = raw[-_ROW_END : -len(_END)]
    if check != _check(before, raw[:-_ROW_END]) or not raw.endswith(_END):
        raise ValueError("the check digest does not match")
    found = _ROW.fullmatch(raw, 0, len(raw) - _ROW_END)
    if found is None:
        raise ValueError("not a row")
    step, epoch, flags, mask, coordinate, text = found.groups()
    more_evaluations, rest = divmod(int(flags), _NEXT_EVALUATION)
    is_evaluation, agreed, not_drawn = _FLAGS[rest]
    line = Line(
        (int(step), is_evaluation),
        None if epoch == b"null" else int(epoch),
        agreed,
        _stages(names, mask),
        a2b_base64(text + b"=="),
        not_drawn,
        None if coordinate is None else tuple(map(int, coordinate.split(b","))),
        more_evaluations + 1,
    )
    if len(line.digests) != 16 * len(line.stages):
        raise ValueError("another number of digests than of stages")
    return line, check


@lru_cache(maxsize=4)
def _parse_1(raw: bytes, before: bytes) -> tuple[Line, bytes]:
    row = json.loads(raw)
    step, epoch, agreed = row["step"], row["epoch"], row["agreed"]
    digests = {str(stage): bytes.fromhex(digest) for stage, digest in row["digests"].items()}
    if not (_is_count(step) and (epoch is None or _is_count(epoch)) and isinstance(agreed, bool)):
        raise ValueError("another type of value")
    if not all(len(digest) == 16 for digest in digests.values()):
        raise ValueError("a digest that does not have 16 bytes")
    # An evaluation of independent replicas has no predictions, which need not agree.
    is_evaluation = "predictions" in digests or (b"%d" % step == before and list(digests) == ["batch"])
    return Line((step, is_evaluation), epoch, agreed, tuple(digests), b"".join(digests.values())), b"%d" % step


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@lru_cache
def _stages(names: tuple[str, ...], mask: bytes) -> tuple[str, ...]:
    return tuple(name for i, name in enumerate(names) if int(mask) >> i & 1)


def _check(before: bytes, content: bytes) -> bytes:
    return _base64(xxhash.xxh3_64_digest(before + content))


def _base64(content: bytes) -> bytes:
    return b2a_base64(content, newline=False).rstrip(b"=")
