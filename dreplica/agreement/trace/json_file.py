"""Write JSON files atomically and in strict JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all.

    The content goes to a temporary file in the same folder, which is flushed and renamed.

    Args:
        path: The file to write.
        value: JSON values. Infinite numbers and NaN are written as null, since JSON has neither.

    Raises:
        OSError: The file cannot be written. An older file is then unchanged.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(finite(value), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Replace each infinite number and NaN in nested dicts and lists with None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
