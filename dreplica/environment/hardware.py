"""Memory, CPU limits and GPUs of this machine."""

import csv
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def available_memory() -> int:
    """Return the bytes of memory that are available within the container's limit."""
    try:
        available = _numbers(Path("/proc/meminfo").read_text())["MemAvailable:"] * 1024
    except FileNotFoundError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_files = _numbers((group / "memory.stat").read_text())
    except (FileNotFoundError, ValueError):  # the root group, the older interface, or a limit of `max`
        return available
    # The page cache counts as used, but is released when memory is needed.
    return min(available, limit - used + of_files["active_file"] + of_files["inactive_file"])


def spell_size(size: float) -> str:
    """Return a number of bytes as text, such as `1.5 GB` or `0.1 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _numbers(text: str) -> dict[str, int]:
    """Return the first number of each line, by its first word."""
    return {words[0]: int(words[1]) for words in (line.split() for line in text.splitlines())}


_CGROUP = Path("/sys/fs/cgroup")


def cpu_limit(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the number of CPUs that this process's cgroup and its parents grant.

    Read from `cpu.max` (cgroup version 2) or the CFS quota (version 1).

    Args:
        root: Mount point of the cgroup file system.
        own: File that names the cgroup of this process.

    Returns:
        The smallest limit, or None without a limit.
    """
    limits = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "cpu", "cpu,cpuacct", "cpuacct,cpu"}:
            continue
        base = root / controllers
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            limits.append(_quota(place))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{key}_us").read_text().strip() for key in ("quota", "period"))
    except OSError:
        return None
    return None if quota in {"max", "-1"} else int(quota) / int(period)


_FIELDS = (
    "index",
    "name",
    "driver_version",
    "mig.mode.current",
    "ecc.mode.current",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
)
_SECONDS = 30.0


def ask_nvidia_smi(fields: Sequence[str] = _FIELDS) -> list[dict[str, str]] | str:
    """Query nvidia-smi for each GPU of this machine.

    Args:
        fields: Names of fields, as in `nvidia-smi --help-query-gpu`.

    Returns:
        One row per GPU, or the reason why nvidia-smi returned none.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not installed"
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not respond within {_SECONDS:.0f} s"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip()}"
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, row, strict=True)) for row in rows]
