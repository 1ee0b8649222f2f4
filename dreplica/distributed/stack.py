"""The Python stack of a thread, in a few short lines."""

import os
import sys
from types import FrameType

_NUM_FRAMES = 10


def stack_of(thread_id: int) -> tuple[str, ...]:
    """Return the innermost frames of a thread as "file:line in function", the innermost last.

    Args:
        thread_id: The thread's identifier (`threading.get_ident`).

    Returns:
        At most ten frames; none if the thread has ended.
    """
    frame: FrameType | None = sys._current_frames().get(thread_id)
    lines: list[str] = []
    while frame is not None and len(lines) < _NUM_FRAMES:
        code = frame.f_code
        lines.append(f"{_short(code.co_filename)}:{frame.f_lineno} in {code.co_qualname}")
        frame = frame.f_back
    return tuple(reversed(lines))


def _short(path: str) -> str:
    """Return the path within the site-packages or within the current folder, where it is in one of them."""
    _, found, inner = path.rpartition(f"{os.sep}site-packages{os.sep}")
    if found:
        return inner
    try:
        folder = os.path.join(os.getcwd(), "")
    except OSError:  # it was removed
        return path
    return path.removeprefix(folder)
