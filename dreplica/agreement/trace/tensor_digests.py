"""`tensors.bin`: the digest of every tensor for every step in `trace.jsonl`, written only if configured.

The digest of a stage in the trace shows only that the stage differs. The digests of its tensors show which tensor, also
between runs made at different times.

The file begins with a line of JSON, `{"format": "dreplica-tensors/2"}`. Frames follow. Each has a head of 16 bytes and
content. The head (little-endian) has two words of 64 bits:

- the layout in the lower 24 bits, the step in the upper 40;
- a check of the first word in the lower 32 bits, a check of the content in the upper 32: bits of XXH3, seeded with the
  frame's offset in the file.

Layout 0 announces names, as JSON: `{"weights": ["conv1.weight", ...], ...}`, stages in causal order. Its step is the
size of the content. The first names announced are layout 1, the next ones layout 2, and so on. Layout n > 0 is a step:
16 bytes for each name of layout n, in order. Names are thus stored once, and a step of 62 tensors takes 1008 bytes.

The frame of a step in the trace is found by the step's number and by the digest of each stage, which is computed from
the names and digests in the frame. A truncated frame ends what can be read, as after a killed process. Anything else
that does not match its check, or a frame that belongs to no line of the trace, is damage.

Format 1, which is still read and appended to, has heads of uint32 layout, uint32 size, int64 step, and no checks.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import Stage

_FIRST_LINES = {number: b'{"format": "dreplica-tensors/%d"}\n' % number for number in (1, 2)}
_LENGTH = len(_FIRST_LINES[1])
_HEAD_SIZE = 16
_HEAD_1, _HEAD_2 = struct.Struct("<IIq"), struct.Struct("<QII")
_LAYOUT_BITS = 24

Layout = tuple[tuple[str, tuple[str, ...]], ...]
"""Each stage with the names of its entries."""


class _Head(NamedTuple):
    layout: int
    """The number of the layout, or 0 for an announcement."""
    size: int
    """The size of the content."""
    step: int
    """The step, or -1 for an announcement."""
    check: int | None
    """The check of the content. None in format 1."""


class _Frame(NamedTuple):
    head: _Head
    start: int
    """The offset of the head."""
    end: int
    """The offset of the next frame."""
    content: bytes
    """The content of an announcement or of the wanted step. Empty if it was not read."""


class TensorRecord:
    """Writer of `tensors.bin`, which flushes each step and appends to an existing file.

    Args:
        path: Path of the file. A truncated frame at its end is removed.

    Raises:
        UsageError: If the existing file is damaged.

    Attributes:
        last_step: The newest step that the file had when it was opened; -1 if it had none.
    """

    def __init__(self, path: Path) -> None:
        self.last_step = -1
        self._layouts: dict[Layout, int] = {}
        self._format, self._end = 0, 0
        if path.exists():
            if not path.is_file():
                text = f"{str(path)!r} is not a regular file. Move it away, or pass another folder."
                raise UsageError(text, code="damaged-tensors", path=str(path))
            with path.open("rb", buffering=0) as file:
                self._format = _format_of(file, path)
                self._end = _LENGTH if self._format else 0
                last: _Frame | None = None
                for frame in _frames(file, path, self._format):
                    if not frame.head.layout:
                        self._layouts[_layout(frame.content)] = len(self._layouts) + 1
                    self.last_step = max(self.last_step, frame.head.step)
                    self._end, last = frame.end, frame
                if last is not None and _read_content(file, path, last.head, last.start) is None:
                    self._end = last.start
        self._file = path.open("ab")
        self._file.truncate(self._end)
        if not self._format:
            self._format, self._end = 2, _LENGTH
            self._file.write(_FIRST_LINES[2])

    def step(self, step: int, stages: Mapping[str, Stage]) -> None:
        """Append the digests of a step's tensors."""
        layout = tuple((name, stage.names) for name, stage in stages.items())
        number = self._layouts.get(layout)
        if number is None:
            number = self._layouts[layout] = len(self._layouts) + 1
            self._write(0, -1, json.dumps(dict(layout)).encode())
        self._write(number, step, b"".join(stage.digests for stage in stages.values()))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, layout: int, step: int, content: bytes) -> None:
        if self._format == 1:
            head = _HEAD_1.pack(layout, len(content), step)
        else:
            word = (layout | (step if layout else len(content)) << _LAYOUT_BITS).to_bytes(8, "little")
            head = word + struct.pack("<II", _check(word, self._end), _check(content, self._end))
        self._file.write(head + content)
        self._end += _HEAD_SIZE + len(content)


def find_stages(
    path: Path, step: int, digests: Mapping[str, str], recorded: Iterable[Mapping[str, str]] = ()
) -> dict[str, Stage] | None:
    """Find the digests of the tensors of a step.

    Args:
        path: Path of `tensors.bin`.
        step: The training step.
        digests: What the trace has recorded of it: stage to 32 hex digits.
        recorded: The digests of all lines that the trace has of this step. Read only if no frame matches `digests`.

    Returns:
        Stage to its tensors' digests, or None if the file does not have the step.

    Raises:
        UsageError: If the file is damaged, or has digests of this step that belong to no line of the trace.
    """
    if not path.is_file():
        return None
    others: list[dict[str, str]] = []
    with path.open("rb", buffering=0) as file:
        layouts: list[Layout] = []
        for frame in _frames(file, path, _format_of(file, path), step):
            if not frame.head.layout:
                layouts.append(_layout(frame.content))
            elif frame.head.step == step:
                stages = _stages(layouts[frame.head.layout - 1], frame.content)
                found = {name: stage.digest.hex() for name, stage in stages.items()}
                if found == dict(digests):
                    return stages
                others.append(found)
    lines = [dict(line) for line in recorded] if others else []
    if any(found.keys() == digests.keys() and found not in lines for found in others):
        raise _damaged(path, f"at step {step}: its digests are not those of the trace", step=step)
    return None


def _format_of(file: BinaryIO, path: Path) -> int:
    """Return the number of the file's format, or 0 if the first line was not written to its end."""
    line = os.pread(file.fileno(), _LENGTH, 0)
    for number, expected in _FIRST_LINES.items():
        if line == expected:
            return number
    if len(line) < _LENGTH or not line.strip(b"\0"):
        return 0
    raise _damaged(path, "at its first line")


def _frames(file: BinaryIO, path: Path, number: int, wanted_step: int | None = None) -> Iterator[_Frame]:
    """Yield the complete frames of a file.

    Args:
        file: The open file, unbuffered.
        path: Its path, for the message.
        number: The number of its format, or 0 if it has no frames.
        wanted_step: The step whose content is read, or None. The content of announcements is always read.

    Raises:
        UsageError: If the file is damaged.
    """
    descriptor, length = file.fileno(), os.fstat(file.fileno()).st_size
    start, sizes = _LENGTH, [0]
    while number and start + _HEAD_SIZE <= length:
        head = _parse_head(os.pread(descriptor, _HEAD_SIZE, start), number, start, sizes)
        if head is None:
            if number == 1 or _is_zero(descriptor, start + _HEAD_SIZE, length):
                return  # truncated, or never written: some file systems leave zeros after a power failure
            raise _damaged(path, f"at byte {start}", position=start)
        end = start + _HEAD_SIZE + head.size
        if end > length:
            return
        content: bytes | None = b""
        if not head.layout or head.step == wanted_step:
            content = _read_content(file, path, head, start)
            if content is None:
                return
        if not head.layout:
            try:
                sizes.append(16 * sum(len(names) for _, names in _layout(content or b"")))
            except (ValueError, TypeError, AttributeError):
                raise _damaged(path, f"at byte {start}", position=start) from None
        yield _Frame(head, start, end, content or b"")
        start = end


def _parse_head(raw: bytes, number: int, start: int, sizes: Sequence[int]) -> _Head | None:
    """Return the head of a frame, or None if it is not one.

    Args:
        raw: The 16 bytes.
        number: The number of the format.
        start: The offset in the file.
        sizes: The size of the content of each layout so far.
    """
    if number == 1:
        layout, size, step = _HEAD_1.unpack(raw)
        is_one = layout < len(sizes) and size == (sizes[layout] if layout else size or -1)
        return _Head(layout, size, step, None) if is_one else None
    word, of_head, of_content = _HEAD_2.unpack(raw)
    layout, rest = word % (1 << _LAYOUT_BITS), word >> _LAYOUT_BITS
    if of_head != _check(raw[:8], start) or layout >= len(sizes):
        return None
    return _Head(layout, sizes[layout], rest, of_content) if layout else _Head(0, rest, -1, of_content)


def _read_content(file: BinaryIO, path: Path, head: _Head, start: int) -> bytes | None:
    """Read the content of a frame and verify it. Return None for the last frame if it was not written to its end."""
    descriptor, end = file.fileno(), start + _HEAD_SIZE + head.size
    content = os.pread(descriptor, head.size, start + _HEAD_SIZE)
    if head.check is None or head.check == _check(content, start):
        return content
    if content.endswith(b"\0") and _is_zero(descriptor, end, os.fstat(descriptor).st_size):
        return None
    if head.layout:
        raise _damaged(path, f"at step {head.step}", step=head.step)
    raise _damaged(path, f"at byte {start}", position=start)


def _is_zero(descriptor: int, start: int, end: int) -> bool:
    """Return True if a part of a file holds only zeros, or nothing."""
    return not any(os.pread(descriptor, 2**20, at).strip(b"\0") for at in range(start, end, 2**20))


def _check(content: bytes, position: int) -> int:
    return xxhash.xxh3_64_intdigest(content, seed=position) & 0xFFFFFFFF


def _damaged(path: Path, what: str, **fields: int) -> UsageError:
    fix = "Restore it from a copy, or remove it: then only the stage of a difference is named, not the tensor."
    return UsageError(f"{str(path)!r} is damaged {what}. {fix}", code="damaged-tensors", path=str(path), **fields)


def _layout(content: bytes) -> Layout:
    return tuple((stage, tuple(names)) for stage, names in json.loads(content).items())


def _stages(layout: Layout, content: bytes) -> dict[str, Stage]:
    stages, start = {}, 0
    for name, names in layout:
        end = start + 16 * len(names)
        stages[name] = Stage(names, content[start:end])
        start = end
    return stages
