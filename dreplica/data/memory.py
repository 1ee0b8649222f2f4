"""How much memory there is."""

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes that this process could still use: of the machine's, and of its container's where that has a limit."""
    try:
        available = _numbers(Path("/proc/meminfo").read_text())["MemAvailable:"] * 1024
    except FileNotFoundError:  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_files = _numbers((group / "memory.stat").read_text())
    except (FileNotFoundError, ValueError):  # the root group, the older interface, or a limit of `max`
        return available
    # What the system keeps of files that were read counts as used, and is given up when it is needed.
    return min(available, limit - used + of_files["active_file"] + of_files["inactive_file"])


def spell_size(size: float) -> str:
    """Bytes as `1.5 GB` or `0.1 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _numbers(text: str) -> dict[str, int]:
    """The first number of each line, by its first word."""
    return {words[0]: int(words[1]) for words in (line.split() for line in text.splitlines())}
