"""Results of a benchmark and their terminal output."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

LOOPS = {"a": "bare PyTorch loop", "b": "trainer, no checks", "c": "trainer, every stage at every step"}
RATIOS = (("b", "a"), ("c", "b"), ("c", "a"))


@dataclass(frozen=True)
class Measured:
    """The results of a benchmark."""

    seconds: dict[str, list[float]]
    """Seconds per step of the slowest replica, per loop and round."""
    bytes_per_step: int
    """Bytes hashed by each replica for each step."""
    snapshot_seconds: float
    """Median seconds of one snapshot, of the slowest replica."""
    checks: list[float] = field(default_factory=list)
    """Time that loop (c) spends in checks divided by that of the rest of the step, per round, of the slowest replica.

    Not meaningful on a GPU, where the process waits for the step itself during the checks."""
    memory: "Memory | None" = None
    """Memory of the GPU, None on the CPU."""

    def ratios(self, one: str, other: str) -> list[float]:
        """Return the time of loop `one` divided by that of loop `other`, per round."""
        return [a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True)]


@dataclass(frozen=True)
class Memory:
    """Device memory in bytes, of the replica that uses most."""

    checks: int
    """Peak memory of the loop with checks minus that of the loop without."""
    snapshot: int
    """Memory of one snapshot."""


def print_measured(console: Console, measured: Measured, num_replicas: int, steps: int, snapshot_every: int) -> None:
    """Print the times per step, their ratios and the cost of a snapshot.

    Args:
        console: The console to print to.
        measured: The results.
        num_replicas: Number of replicas.
        steps: Number of timed steps of each loop in a round.
        snapshot_every: Steps between snapshots in the config, 0 for none.
    """
    rounds = len(measured.seconds["c"])
    table = Table(title=f"{num_replicas} replicas, {rounds} alternating rounds of {steps} steps", title_justify="left")
    for column in ("loop", "ms per step: median", "min", "max"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, text in LOOPS.items():
        values = [1000 * value for value in measured.seconds[name]]
        table.add_row(f"({name}) {text}", *(f"{f(values):.1f}" for f in (statistics.median, min, max)))
    console.print(table)
    for one, other in RATIOS:
        ratios = measured.ratios(one, other)
        low, high = median_interval(ratios)
        console.print(
            f"({one})/({other}) = {statistics.median(ratios):.3f}  (95 %: {low:.3f} to {high:.3f})", highlight=False
        )
    if measured.memory is None:
        low, high = median_interval(measured.checks)
        console.print(
            f"the checks alone: {statistics.median(measured.checks):.2%} of the rest of the step  "
            f"(95 %: {low:.2%} to {high:.2%})",
            highlight=False,
        )
    console.print(f"hashed by each replica: {measured.bytes_per_step / 1e6:.1f} MB per step", highlight=False)
    if measured.memory is not None:
        checks, snapshot = (size / 1e6 for size in (measured.memory.checks, measured.memory.snapshot))
        console.print(
            f"device memory of the checks: {checks:.1f} MB, and a snapshot {snapshot:.1f} MB", highlight=False
        )
    if snapshot_every:
        share = measured.snapshot_seconds / snapshot_every / statistics.median(measured.seconds["c"])
        console.print(
            f"a snapshot every {snapshot_every} steps: {1000 * measured.snapshot_seconds:.1f} ms each, not in the "
            f"above; {share:.2%} of a step",
            highlight=False,
        )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a confidence interval of at least 95 % for the median of the distribution of `values`.

    Free of assumptions on how they are distributed: from the k-th smallest of n values to the k-th largest, the median
    is within with probability 1 - 2 P(B < k), B binomial of n and 1/2 (Conover, "Practical Nonparametric Statistics",
    section 3.2). The whole range where there are too few, fewer than six.
    """
    ordered, n = sorted(values), len(values)
    k, outside = 0, 2 * 0.5**n  # twice the probability that B is at most k
    while outside <= 0.05:
        k += 1
        outside += 2 * math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]
