"""One line of a trace: the digests of a checked step or evaluation."""

from typing import NamedTuple

GENERATOR_NAMES = {"python": "Python", "numpy": "NumPy"}
"""Generators of which a row says whether they were drawn from, and their names in messages."""
GENERATORS = tuple(GENERATOR_NAMES)

Key = tuple[int, bool]
"""A training step, and True for the evaluation that follows it."""

Order = tuple[int, int, tuple[int, ...]]
"""A training step, the number of the evaluation that follows it or 0, and the coordinate."""


class Line(NamedTuple):
    """The record of a checked step or evaluation."""

    key: Key
    """The training step, and True for the evaluation that follows it."""
    epoch: int | None
    """The epoch, from 1, or None if the run did not pass it."""
    agreed: bool
    """True if the run's replicas agreed."""
    stages: tuple[str, ...]
    """The names of the recorded stages."""
    digests: bytes
    """The stages' digests, 16 bytes for each name."""
    not_drawn: tuple[str, ...] = ()
    """The generators, `python` and `numpy`, that were not drawn from since the process began."""
    coordinate: tuple[int, ...] | None = None
    """The coordinate of the shard, one integer for each of the trace's axes. None if ranks do not hold shards."""

    number: int = 1
    """The number of the evaluation among those that follow the step, from 1."""

    @property
    def order(self) -> Order:
        """The position among the lines of a run."""
        step, is_evaluation = self.key
        return step, self.number if is_evaluation else 0, self.coordinate or ()

    def by_stage(self) -> dict[str, bytes]:
        """Return stage name to its digest of 16 bytes."""
        return {name: self.digests[16 * i : 16 * i + 16] for i, name in enumerate(self.stages)}
