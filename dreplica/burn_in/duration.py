"""How long a burn-in goes on: `90s`, `30m`, `8h`."""

import re

from dreplica.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration(text: str) -> float:
    """Seconds, more than 0, of what is written as a number and a unit. Raises UsageError."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(
            f"--for: {text!r} will not do: expected a number and a unit (s, m, h or d). For instance --for 30m."
        )
    return seconds


def spell_duration(seconds: float) -> str:
    """As `parse_duration` reads it, in the unit that suits, rounded."""
    unit = next((unit for unit in ("h", "m") if seconds >= 2 * _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.3g}{unit}"
