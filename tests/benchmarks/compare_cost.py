"""Measure the time and memory of `dreplica compare` on long traces, each case in its own process.

    python -m tests.benchmarks.compare_cost [--steps 1000000] [--folder FOLDER]

The traces are of random digests: eight stages a step, about 205 bytes a line.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from dreplica.agreement.trace.line import Line
from dreplica.agreement.trace.line_format import Header, encode_content, seal

STAGES = ("indices", "batch", "buffers", "output", "gradients", "optimizer", "weights", "rng")


def write_trace(path: Path, num_steps: int, epochs_from: int = 1, other_at: int | None = None) -> None:
    """Write a trace of random digests.

    Args:
        path: Path of the file.
        num_steps: Number of steps.
        epochs_from: Number of the first epoch.
        other_at: A step at which the digest of the weights differs, or None.
    """
    draw = random.Random(0)
    header = Header("xxh3-128/1", "2.15.0", 2)
    before = header.seed
    with path.open("wb") as file:
        file.write(header.encode())
        for step in range(1, num_steps + 1):
            digests = draw.randbytes(16 * len(STAGES))
            if step == other_at:
                digests = bytes(len(digests))
            line = Line((step, False), step // 1000 + epochs_from, True, STAGES, digests)
            raw, before = seal(header, encode_content(header, line), before)
            file.write(raw)


def measure(one: Path, other: Path) -> tuple[int, float, float, str]:
    """Return exit code, seconds of CPU time, peak resident memory in MB, and the verdict."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreplica.commands.main", "compare", str(one), str(other)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    words = ("IDENTICAL", "DIFFERENT", "SAME SO FAR")
    verdict = next((line for line in output.splitlines() if line.startswith(words)), output)
    return os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024, verdict


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        one, other = folder / "one.jsonl", folder / "other.jsonl"
        write_trace(one, given.steps)
        size = one.stat().st_size / 2**20
        print(f"{given.steps:,} steps, {size:.0f} MB each; exit code, CPU seconds, peak MB, verdict")
        cases = {
            "the same": {},
            "another digest in the last step": {"other_at": given.steps},
            "epochs counted from 2": {"epochs_from": 2},
        }
        for case, keywords in cases.items():
            write_trace(other, given.steps, **keywords)
            code, seconds, peak, verdict = measure(one, other)
            print(f"{case:32s} {code} {seconds:6.1f} s {peak:6.0f} MB  {verdict[:80]}", flush=True)
        with other.open("rb+") as file:
            file.truncate(other.stat().st_size - 100)
        code, seconds, peak, verdict = measure(one, other)
        print(f"{'cut off in its last line':32s} {code} {seconds:6.1f} s {peak:6.0f} MB  {verdict[-80:]}")


if __name__ == "__main__":
    main()
