"""Two recorded traces, step by step: the first step, stage and tensor in which they differ, or that there is none."""

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
"""A line on which replicas agreed, without its hex digits."""


@dataclass
class Comparison:
    """What comparing two traces came to; of steps that only one of them has recorded, nothing can be said."""

    place: Place | None = None
    """Where they part first, the traces' groups being [[0], [1]]; None if they nowhere do."""
    epoch: int | None = None
    """Of that step."""
    agreed: tuple[bool, bool] = (True, True)
    """Whether each run's own replicas still agreed there."""
    num_steps: int = 0
    """How many steps that both have are the same; the build is none."""
    last_step: int = -1
    """The newest of these, or the build; -1 if there is none."""
    num_same: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    """Stage to the number of its digests that are the same."""
    num_alone: list[int] = field(default_factory=lambda: [0, 0])
    """Lines of steps that only the one trace has, and only the other: up to where both go."""
    epochs_differ_at: int | None = None
    """The first step that is the same and that the two count to different epochs."""

    @property
    def num_digests(self) -> int:
        """How many digests are the same."""
        return sum(self.num_same.values())

    @property
    def only_samples(self) -> bool:
        """Whether nothing of any replica's state is among them."""
        return all(stage in INDEPENDENT_STAGES for stage, count in self.num_same.items() if count)

    def count(self, step: int, stages: Iterable[str]) -> None:
        """A step that is the same in these stages."""
        for stage in stages:
            self.num_same[stage] += 1
        self.num_steps += step > max(self.last_step, 0)
        self.last_step = step


def compare_traces(one: Trace, other: Trace) -> Comparison:
    """Reads both to the end, line by line. Raises UsageError where their digests are of different algorithms."""
    if one.algorithm != other.algorithm:
        raise UsageError(
            f"{str(one.path)!r} has digests of algorithm {one.algorithm!r}, {str(other.path)!r} of "
            f"{other.algorithm!r}: they would differ whatever the runs did. Record both with one release."
        )
    found = Comparison()
    found = _compare(one, other, _same_beginning(one, other, found), found)
    if one.first_repeated is not None or other.first_repeated is not None:
        found = _compare(one, other, Start(), Comparison())  # with what counts of the steps that were done again
    return found


def find_differing_stages(line: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The stages in which two lines differ, in causal order, of those that both have."""
    return [stage for stage in STAGES if stage in line and stage in other and line[stage] != other[stage]]


def place_of(
    key: tuple[int, bool],
    differing_stages: list[str],
    one: Mapping[str, Stage] | None,
    other: Mapping[str, Stage] | None,
) -> Place:
    """The place of a difference, down to the tensor where both sides' single digests are known."""
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
        if common:  # else they have recorded different things of this step
            found.count(here.key[0], common)
        if here.epoch != there.epoch and found.epochs_differ_at is None:
            found.epochs_differ_at = here.key[0]
    for rest in (ours, theirs):
        for _ in rest:
            pass
    return found


def _same_beginning(one: Trace, other: Trace, found: Comparison) -> Start:
    """Up to where both have the same bytes, and nothing that needs a closer look: counts a block of lines at a time."""
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
    """The stages of a line without its hex digits: what is left of their names is distinct."""
    return [stage for stage, name in _NAMES.items() if b'"%s": ""' % name in kind]


def _in_step(ours: Iterator[Line], theirs: Iterator[Line], found: Comparison) -> Iterator[tuple[Line, Line]]:
    """The lines of what both have recorded; counts in `found` what only one has."""
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
