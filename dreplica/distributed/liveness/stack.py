"""The Python stack of a thread, in a few short lines."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from types import FrameType

_NUM_FRAMES = 10
_LIBRARY = "..."
"""First characters of the frames of libraries."""


def stack_of(thread_id: int) -> tuple[str, ...]:
    """Return the innermost frames of a thread as "file:line in function", the innermost last.

    Args:
        thread_id: The thread's identifier (`threading.get_ident`).

    Returns:
        At most ten frames, of which the first is the user's if the others are of libraries. None if the thread has
        ended.
    """
    frame: FrameType | None = sys._current_frames().get(thread_id)
    lines: list[str] = []
    while frame is not None:
        code = frame.f_code
        line = f"{_short(code.co_filename)}:{frame.f_lineno} in {code.co_qualname}"
        if len(lines) < _NUM_FRAMES:
            lines.append(line)
        elif not _is_library(lines[-1]):
            break
        else:
            lines[-1] = line  # the user's own frame says more than one of a library
        frame = frame.f_back
    return tuple(reversed(lines))


def innermost(stack: Sequence[str]) -> str:
    """Return the innermost frame outside of libraries, or the innermost frame if all are of libraries."""
    return next((line for line in reversed(stack) if not _is_library(line)), stack[-1])


def _is_library(line: str) -> bool:
    return line.startswith(_LIBRARY)


def _short(path: str) -> str:
    """Return the path within the site-packages, the standard library or the current folder, if it is in one of them."""
    _, found, inner = path.rpartition(f"{os.sep}site-packages{os.sep}")
    if found:
        return os.path.join(_LIBRARY, inner)
    standard = os.path.join(sysconfig.get_paths()["stdlib"], "")
    if path.startswith((standard, "<frozen ")):
        return os.path.join(_LIBRARY, path.removeprefix(standard))
    try:
        folder = os.path.join(os.getcwd(), "")
    except OSError:  # it was removed
        return path
    return path.removeprefix(folder)
