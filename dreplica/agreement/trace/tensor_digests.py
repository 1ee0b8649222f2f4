"""`tensors.bin`: the digest of every tensor for every step in `trace.jsonl`, written only if configured.

The digest of a stage in the trace shows only that the stage differs. The digests of its tensors show which tensor, also
between runs made at different times.

The file begins with a line of JSON, `{"format": "dreplica-tensors/1"}`. Frames follow. Each has a head of 16 bytes
(little-endian: uint32 layout, uint32 size, int64 step) and `size` bytes of content:

- Layout 0 announces names, as JSON: `{"weights": ["conv1.weight", ...], ...}`, stages in causal order. The first names
  announced are layout 1, the next ones layout 2, and so on. The step is -1.
- Layout n > 0 is a step: 16 bytes for each name of layout n, in order. Names are thus stored once, and a step of 62
  tensors takes 1008 bytes.

The frame of a step in the trace is found by the step's number and by the digest of each stage, which is computed from
the names and digests in the frame. A frame that does not match the trace is therefore never used. A truncated frame
ends what can be read.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from dreplica.state.fingerprint.stage import Stage

_HEAD = struct.Struct("<IIq")
_FIRST_LINE = b'{"format": "dreplica-tensors/1"}\n'

Layout = tuple[tuple[str, tuple[str, ...]], ...]
"""Each stage with the names of its entries."""
_Frame = tuple[int, int, int, int]
"""Layout, size, step, and the file offset of the content."""


class TensorRecord:
    """Writer of `tensors.bin`, which flushes each step and appends to an existing file.

    Args:
        path: Path of the file. A truncated frame at its end is removed.

    Attributes:
        last_step: The newest step that the file had when it was opened; -1 if it had none.
    """

    def __init__(self, path: Path) -> None:
        self.last_step = -1
        self._layouts: dict[Layout, int] = {}
        end = 0
        if path.exists():
            with path.open("rb", buffering=0) as file:
                end = len(_FIRST_LINE) if _is_ours(file) else 0
                for layout, size, step, start in _frames(file):
                    if not layout:
                        self._layouts[_layout(os.pread(file.fileno(), size, start))] = len(self._layouts) + 1
                    self.last_step = max(self.last_step, step)
                    end = start + size
        self._file = path.open("ab")
        self._file.truncate(end)
        if not end:
            self._file.write(_FIRST_LINE)

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
        self._file.write(_HEAD.pack(layout, len(content), step) + content)


def find_stages(path: Path, step: int, digests: Mapping[str, str]) -> dict[str, Stage] | None:
    """Find the digests of the tensors of a step.

    Args:
        path: Path of `tensors.bin`.
        step: The training step.
        digests: What the trace has recorded of it: stage to 32 hex digits.

    Returns:
        Stage to its tensors' digests, or None if the file does not have the step.
    """
    if not path.exists():
        return None
    layouts: list[Layout] = []
    with path.open("rb", buffering=0) as file:
        for layout, size, of_step, start in _frames(file):
            if layout and of_step != step:
                continue
            content = os.pread(file.fileno(), size, start)
            if not layout:
                layouts.append(_layout(content))
                continue
            stages = _stages(layouts[layout - 1], content)
            if {name: stage.digest.hex() for name, stage in stages.items()} == dict(digests):
                return stages
    return None


def _frames(file: BinaryIO) -> Iterator[_Frame]:
    """Yield the complete frames of a file, or none if it has another format."""
    descriptor, length = file.fileno(), os.fstat(file.fileno()).st_size
    if not _is_ours(file):
        return
    place, num_layouts = len(_FIRST_LINE), 0
    while place + _HEAD.size <= length:
        layout, size, step = _HEAD.unpack(os.pread(descriptor, _HEAD.size, place))
        start = place + _HEAD.size
        if layout > num_layouts or start + size > length or (not layout and not size):
            return  # truncated, or never written: some file systems leave zeros after a power failure
        num_layouts += not layout
        yield layout, size, step, start
        place = start + size


def _is_ours(file: BinaryIO) -> bool:
    """Return True if the file has this format."""
    return os.pread(file.fileno(), len(_FIRST_LINE), 0) == _FIRST_LINE


def _layout(content: bytes) -> Layout:
    return tuple((stage, tuple(names)) for stage, names in json.loads(content).items())


def _stages(layout: Layout, content: bytes) -> dict[str, Stage]:
    stages, start = {}, 0
    for name, names in layout:
        end = start + 16 * len(names)
        stages[name] = Stage(names, content[start:end])
        start = end
    return stages
