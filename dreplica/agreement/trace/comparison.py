"""Comparison of two recorded traces, step by step, for the first step, stage and tensor that differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreplica.agreement.trace.line import Line
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.verdict.location import Place, first_difference
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, STAGES, Stage


@dataclass
class Comparison:
    """Result of the comparison of two traces. Only steps that both have recorded are compared."""

    place: Place | None = None
    """The first difference, in which the traces are replicas 0 and 1; None if there is none."""
    epoch: int | None = None
    """The epoch of the first difference, or None."""
    coordinate: dict[str, int] | None = None
    """Axis to coordinate of the shard that differs first. None if ranks do not hold shards."""
    agreed: tuple[bool, bool] = (True, True)
    """For each run, True if its own replicas agreed at the first difference."""
    num_steps: int = 0
    """Number of equal steps that both traces have, without the build."""
    last_step: int = -1
    """The newest equal step, 0 for the build, or -1 if there is none."""
    num_lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    """The number of lines that are equal in exactly these stages."""
    num_alone: list[int] = field(default_factory=lambda: [0, 0])
    """Number of lines that only the first and only the second trace has, up to the end of the shorter one."""
    num_unknown: int = 0
    """Number of equal lines in which `rng` was not compared, since a run that resumed does not know whether a generator
    was drawn from before."""
    not_drawn: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """For each run, the generators that were not drawn from up to the first difference."""
    epochs_differ_at: int | None = None
    """The first equal step that the two runs assign to different epochs, or None."""

    @property
    def num_same(self) -> dict[str, int]:
        """Stage to its number of equal digests."""
        return {stage: sum(count for names, count in self.num_lines.items() if stage in names) for stage in STAGES}

    @property
    def num_digests(self) -> int:
        """Number of equal digests."""
        return sum(self.num_same.values())

    @property
    def only_samples(self) -> bool:
        """True if the equal digests are of `indices` and `batch` only."""
        return all(stage in INDEPENDENT_STAGES for stage, count in self.num_same.items() if count)

    def count(self, step: int, stages: tuple[str, ...]) -> None:
        """Count a line that is equal in these stages."""
        self.num_lines[stages] = self.num_lines.get(stages, 0) + 1
        self.num_steps += step > max(self.last_step, 0)
        self.last_step = step


def compare_traces(one: Trace, other: Trace) -> Comparison:
    """Compare two traces, reading both to the end line by line.

    Raises:
        UsageError: If their digests are of different algorithms, or a line is damaged.
    """
    if one.algorithm != other.algorithm:
        raise UsageError(
            f"{str(one.path)!r} has digests of algorithm {one.algorithm!r}, {str(other.path)!r} of "
            f"{other.algorithm!r}, so they cannot be compared. Record both runs with the same release, on the same "
            "kind of device.",
            code="algorithms-differ",
            algorithms=[one.algorithm, other.algorithm],
        )
    found = _compare(one, other)
    if one.first_repeated is not None or other.first_repeated is not None:
        found = _compare(one, other)  # now only the newest line of repeated steps counts
    return found


def find_differing_stages(line: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the stages that both lines have and that differ, in causal order."""
    return [stage for stage in STAGES if stage in line and stage in other and line[stage] != other[stage]]


def place_of(
    key: tuple[int, bool],
    differing_stages: list[str],
    one: Mapping[str, Stage] | None,
    other: Mapping[str, Stage] | None,
) -> Place:
    """Return the place of a difference, with the tensor if both sides have recorded digests of tensors.

    Args:
        key: The step, and True for the evaluation that follows it.
        differing_stages: The stages that differ, in causal order.
        one: The tensors' digests of the first side, or None if they were not recorded.
        other: The tensors' digests of the second side, or None.

    Returns:
        The place. The two sides are its replicas 0 and 1.
    """
    (step, is_evaluation), stage = key, differing_stages[0]
    phase = "evaluation" if is_evaluation else None
    if one is None or other is None:
        return Place(step, stage, None, [[0], [1]], 0, 0, differing_stages, {}, phase)
    rows = [{name: side[name] for name in differing_stages} for side in (one, other)]
    return first_difference([step, step], rows, [phase, phase])


def is_undrawn_difference(line: Line, other: Line) -> bool:
    """Return True if two lines differ only in generators that one of the runs did not draw from.

    The stage `rng` holds a constant in place of such a generator. A run that resumed does not know what was drawn from
    before, so for such a run this is not a difference.
    """
    differing_stages = find_differing_stages(line.by_stage(), other.by_stage())
    return line.order == other.order and differing_stages == ["rng"] and line.not_drawn != other.not_drawn


def _compare(one: Trace, other: Trace) -> Comparison:
    found = Comparison()
    ours, theirs = one.lines(), other.lines()
    for here, there in _in_step(ours, theirs, found):
        if here.digests == there.digests and here.stages == there.stages:
            common = here.stages
        else:
            row, other_row = here.by_stage(), there.by_stage()
            differing_stages = find_differing_stages(row, other_row)
            if is_undrawn_difference(here, there) and (one.is_uncertain(here) or other.is_uncertain(there)):
                differing_stages = []
                row.pop("rng")
                found.num_unknown += 1
            if differing_stages:
                found.place = place_of(here.key, differing_stages, one.tensors(here), other.tensors(there))
                found.epoch, found.agreed = here.epoch, (here.agreed, there.agreed)
                found.not_drawn = here.not_drawn, there.not_drawn
                if here.coordinate is not None:
                    found.coordinate = dict(zip(one.axes, here.coordinate, strict=False))
                    found.num_steps -= (found.last_step, False) == here.key  # equal in other shards only
                break
            common = tuple(stage for stage in STAGES if stage in row and stage in other_row)
        if common:  # otherwise they have recorded different stages of this step
            found.count(here.key[0], common)
        if here.epoch != there.epoch and found.epochs_differ_at is None:
            found.epochs_differ_at = here.key[0]
    for rest in (ours, theirs):
        for _ in rest:
            pass
    return found


def _in_step(ours: Iterator[Line], theirs: Iterator[Line], found: Comparison) -> Iterator[tuple[Line, Line]]:
    """Yield the lines of steps that both have recorded, and count in `found` those that only one has."""
    here, there = next(ours, None), next(theirs, None)
    while here is not None and there is not None:
        if here.key == there.key and here.coordinate == there.coordinate:
            yield here, there
            here, there = next(ours, None), next(theirs, None)
        elif here.order < there.order:
            found.num_alone[0] += 1
            here = next(ours, None)
        else:
            found.num_alone[1] += 1
            there = next(theirs, None)
