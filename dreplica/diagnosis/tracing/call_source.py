"""The line of code that called an operator."""

import os
import sys
from pathlib import Path

import torch

from dreplica.config.paths import PACKAGE_ROOT

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN_CODE = tuple(str(PACKAGE_ROOT / name) + os.sep for name in ("diagnosis", "training"))
_TRACING = str(Path(__file__).parent) + os.sep


def user_source() -> str:
    """Return the innermost frame outside of torch, or "" if the training step is reached first."""
    frame = sys._getframe()  # in autograd's GPU threads, the tracer may have the only frame
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN_CODE) and not file.startswith(_TRACING):
            return ""
        if not file.startswith((_TRACING, _TORCH, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
