"""Comparison of two recorded traces, step by step, for the first step, stage and tensor that differ."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from dreplica.agreement.trace.reader import Line, Start, Trace
from dreplica.agreement.verdict.location import Place, first_difference
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, STAGES, Stage

_BLOCK_BYTES = 2**20
_HEX_DIGITS = b"0123456789abcdef"
_NAMES = {stage: stage.encode().translate(None, _HEX_DIGITS) for stage in STAGES}
_STEP = re.compile(rb'"step": (\d+)')
_KIND = re.compile(rb'\{"stp": , "poh": (null)?, "gr": tru, "igsts": \{("\w+": ""(, )?)*\}\}')
"""A line on which replicas agreed, with all hex digits removed (the letters a to f of keys included)."""


@dataclass
class Comparison:
    """Result of the comparison of two traces. Only steps that both have recorded are compared."""

    place: Place | None = None
    """The first difference, in which the traces are replicas 0 and 1; None if there is none."""
    epoch: int | None = None
    """The epoch of the first difference, or None."""
    agreed: tuple[bool, bool] = (True, True)
    """For each run, True if its own replicas agreed at the first difference."""
    num_steps: int = 0
    """Number of equal steps that both traces have, without the build."""
    last_step: int = -1
    """The newest equal step, 0 for the build, or -1 if there is none."""
    num_same: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    """Stage to its number of equal digests."""
    num_alone: list[int] = field(default_factory=lambda: [0, 0])
    """Number of lines that only the first and only the second trace has, up to the end of the shorter one."""
    epochs_differ_at: int | None = None
    """The first equal step that the two runs assign to different epochs, or None."""

    @property
    def num_digests(self) -> int:
        """Number of equal digests."""
        return sum(self.num_same.values())

    @property
    def only_samples(self) -> bool:
        """True if the equal digests are of `indices` and `batch` only."""
        return all(stage in INDEPENDENT_STAGES for stage, count in self.num_same.items() if count)

    def count(self, step: int, stages: Iterable[str]) -> None:
        """Count a step that is equal in these stages."""
        for stage in stages:
            self.num_same[stage] += 1
        self.num_steps += step > max(self.last_step, 0)
        self.last_step = step


def compare_traces(one: Trace, other: Trace) -> Comparison:
    """Compare two traces, reading both to the end line by line.

    Raises:
        UsageError: If their digests are of different algorithms, or a line is not one of a trace.
    """
    if one.algorithm != other.algorithm:
        raise UsageError(
            f"{str(one.path)!r} has digests of algorithm {one.algorithm!r}, {str(other.path)!r} of "
            f"{other.algorithm!r}, so they cannot be compared. Record both runs with the same release, on the same "
            "kind of device.",
            code="algorithms-differ",
            algorithms=[one.algorithm, other.algorithm],
        )
    found = Comparison()
    found = _compare(one, other, _same_beginning(one, other, found), found)
    if one.first_repeated is not None or other.first_repeated is not None:
        found = _compare(one, other, Start(), Comparison())  # now only the newest line of repeated steps counts
    return found


def find_differing_stages(line: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
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


def _compare(one: Trace, other: Trace, start: Start, found: Comparison) -> Comparison:
    ours, theirs = one.lines(start), other.lines(start)
    kinds: dict[bytes, list[str]] = {}
    for here, there in _in_step(ours, theirs, found):
        if here.digests == there.digests:
            kind = here.digests.translate(None, _HEX_DIGITS)
            if kind not in kinds:
                kinds[kind] = _stages_of(kind)
            common = kinds[kind]
        else:
            row, other_row = one.digests(here), other.digests(there)
            differing_stages = find_differing_stages(row, other_row)
            if differing_stages:
                found.place = place_of(here.key, differing_stages, one.tensors(here), other.tensors(there))
                found.epoch, found.agreed = here.epoch, (here.agreed, there.agreed)
                break
            common = [stage for stage in STAGES if stage in row and stage in other_row]
        if common:  # otherwise they have recorded different stages of this step
            found.count(here.key[0], common)
        if here.epoch != there.epoch and found.epochs_differ_at is None:
            found.epochs_differ_at = here.key[0]
    for rest in (ours, theirs):
        for _ in rest:
            pass
    return found


def _same_beginning(one: Trace, other: Trace, found: Comparison) -> Start:
    """Count the lines at the beginning that are equal in all bytes, a block at a time, and return where they end.

    Stops before lines that need a closer look: replicas that diverged, repeated steps, other formatting.
    """
    start = Start()
    with one.path.open("rb") as file, other.path.open("rb") as other_file:
        for each in (file, other_file):
            each.readline()
        while True:
            block = file.read(_BLOCK_BYTES)
            if not block or block != other_file.read(_BLOCK_BYTES):
                return start
            whole = block[: block.rfind(b"\n") + 1]
            steps = [start.step, *map(int, _STEP.findall(whole))]
            kinds = Counter(whole.translate(None, _HEX_DIGITS).splitlines())
            usual = all(_KIND.fullmatch(kind) for kind in kinds)
            if not (kinds and usual) or len(steps) != kinds.total() + 1 or steps != sorted(steps):
                return start
            for kind, count in kinds.items():
                for stage in _stages_of(kind):
                    found.num_same[stage] += count
            found.num_steps += len(set(steps) - {start.step, 0})
            found.last_step = steps[-1]
            start = Start(start.num_bytes + len(whole), start.num_lines + kinds.total(), steps[-1])
            for each in (file, other_file):
                each.seek(len(whole) - len(block), os.SEEK_CUR)


def _stages_of(kind: bytes) -> list[str]:
    """Return the stages of a line whose hex digits were removed, which leaves their names distinct."""
    return [stage for stage, name in _NAMES.items() if b'"%s": ""' % name in kind]


def _in_step(ours: Iterator[Line], theirs: Iterator[Line], found: Comparison) -> Iterator[tuple[Line, Line]]:
    """Yield the lines of steps that both have recorded, and count in `found` those that only one has."""
    here, there = next(ours, None), next(theirs, None)
    while here is not None and there is not None:
        if here.key == there.key:
            yield here, there
            here, there = next(ours, None), next(theirs, None)
        elif here.key < there.key:
            found.num_alone[0] += 1
            here = next(ours, None)
        else:
            found.num_alone[1] += 1
            there = next(theirs, None)
