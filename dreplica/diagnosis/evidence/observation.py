"""What replicas have to say about a step that was run again, and what is made of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.stages import STAGES


@dataclass(frozen=True)
class OpDifference:
    """The first operator at which two records of a step part."""

    index: int
    one: OpRecord | None
    other: OpRecord | None
    """None where one of the two has ended."""
    extra: OpRecord | None = None
    """An operator that only one side has, where the other goes on as that side does after it."""
    suspect: OpRecord | None = None
    """Which of the two is the suspect's, if that is known."""

    @property
    def same_structure(self) -> bool:
        """Whether it is the same operator on both sides."""
        return self.one is not None and self.other is not None and self.one.same_operator(self.other)

    @property
    def inputs_agree(self) -> bool:
        """Whether the operator was given the same, so that it is itself what made the difference."""
        return self.one is not None and self.other is not None and self.one.inputs == self.other.inputs

    @property
    def same_call(self) -> bool:
        """Whether it is the same operator on both sides, called with the same numbers and settings."""
        if self.one is None or self.other is None:
            return False
        return self.same_structure and self.one.scalars == self.other.scalars

    @property
    def made_here(self) -> bool:
        """Whether the operator itself made the difference: the same call on the same inputs gave other outputs."""
        return self.same_call and self.inputs_agree

    @property
    def record(self) -> OpRecord:
        """The operator, as one side has it."""
        record = self.extra or self.suspect or self.one or self.other
        assert record is not None
        return record


@dataclass(frozen=True)
class Witness:
    """What one replica has to say about the step in question."""

    original: Mapping[str, bytes]
    """Digest of each stage as it was when replicas parted."""
    first: Mapping[str, bytes]
    """And in the first replay,"""
    second: Mapping[str, bytes]
    """and the second."""
    records: Sequence[OpRecord]
    """The first replay's operators."""
    against_itself: OpDifference | None
    """Where its own two replays part."""
    contents: Contents
    """Of the first replay."""
    indices_intact: bool
    """Whether the first replay used the indices it was given."""
    generator: bytes
    """State of torch's CPU generator after the first replay."""
    generator_struck: bool
    """Whether something else than an operator that draws changed it in that replay."""
    sample_digests: Sequence[bytes]
    """One for each sample of the batch, loaded by itself."""
    samples_are_random: bool = False
    """Whether a sample comes out otherwise when the global generators stand otherwise."""
    loaded_by_workers: bool = False
    layout: bytes = b""
    """Digest of how parameters, buffers and inputs lie in memory, which their own digests leave out."""
    original_generator: bytes = b""
    """State of torch's CPU generator after the step in question; empty if it was not kept."""
    unreproduced: int | None = None
    """A step before, at which it did not come out as it was compared."""


@dataclass(frozen=True)
class Struck:
    """Memory that seems to have changed by itself, to be looked at in full."""

    replica_id: int
    sound_id: int
    """Another replica, on which it has not."""
    index: int | None
    """The operator that read it; None if it was left so at the step's end."""
    stage: str | None = None
    tensor: str | None = None
    """Where it was left; None for what an operator read."""


@dataclass(frozen=True)
class Decision:
    """A cause, and what it rests on."""

    cause: str
    suspects: list[int]
    evidence: list[str]
    operator: OpDifference | None = None
    sides: tuple[int, int] | None = None
    """Two replicas whose operator outputs differ, to be compared in full."""
    replica_against_itself: int | None = None
    classes: list[list[int]] | None = None
    positions: list[int] = field(default_factory=list)
    """Positions in the batch of the samples that differ."""
    struck: Struck | None = None
    settled: bool = False
    """Whether the operator, run in float64, has told which side is wrong,"""
    both_possible: bool = False
    """or that neither is."""


_STAGES_OF_PHASE = {
    "forward": {"buffers", "output", "gradients"},
    "backward": {"buffers", "gradients"},
    "optimizer": {"gradients", "optimizer", "weights"},
}
"""The stages at which what an operator of a phase makes can come to light first."""


def could_have_made(record: OpRecord, stage: str | None) -> bool:
    """Whether replicas that part first in `stage` may have parted in what this operator gave."""
    return record.earlier or stage in _STAGES_OF_PHASE.get(record.phase, ())


def first_stage(rows: Sequence[Mapping[str, bytes]]) -> str | None:
    """The first stage in causal order of which not all rows have the same digest; None if there is none."""
    return next((stage for stage in STAGES if len({row.get(stage) for row in rows}) > 1), None)


def up_to(stages: Mapping[str, bytes], last: str | None) -> bytes:
    """The digests of all stages up to and with `last`, in causal order; of all there are if it is None."""
    names = STAGES if last is None else STAGES[: STAGES.index(last) + 1]
    return b"".join(stages[name] for name in names if name in stages)


def first_difference(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> OpDifference | None:
    """Where two records part: another operator, another call of it, other outputs, or inputs that no operator made."""
    return next(_differences(one, other), None)


def difference_behind(one: Sequence[OpRecord], other: Sequence[OpRecord], stage: str | None) -> OpDifference | None:
    """The first place where two records part that may have to do with what first shows in `stage`; None if none has.

    Two replicas may part before, in what leads to no stage, and after it, in something else. What shows in the samples
    or in a generator was made by no operator, but read or drawn by any.
    """
    places = _differences(one, other)
    return next((place for place in places if not _is_made(stage) or could_have_made(place.record, stage)), None)


def _is_made(stage: str | None) -> bool:
    return any(stage in stages for stages in _STAGES_OF_PHASE.values())


def _differences(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> Iterator[OpDifference]:
    """All places where two records part, up to the first where they have not the same operator."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        place = OpDifference(index, a, b)
        if not place.same_structure:
            yield replace(place, extra=_extra(one, other, index))
            return
        if not place.made_here or a.outputs != b.outputs:
            yield place
    if len(one) != len(other):
        index = min(len(one), len(other))
        ends = (side[index] if index < len(side) else None for side in (one, other))
        yield OpDifference(index, *ends)


def _extra(one: Sequence[OpRecord], other: Sequence[OpRecord], index: int) -> OpRecord | None:
    for side, across in ((one, other), (other, one)):
        if index + 1 < len(side) and side[index + 1].same_operator(across[index]):
            return side[index]
    return None
