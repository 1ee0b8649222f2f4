"""The observations of each replica on a replayed step, and the decision that is made from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.place_alignment import align, extra_side
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.foreign_code import Foreign
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.stages import STAGES


@dataclass(frozen=True)
class OpDifference:
    """The first operator at which two records of a step differ."""

    index: int
    """Position of the operator in the step, in the first record."""
    one: OpRecord | None
    """The operator of the first record; None where that record has ended."""
    other: OpRecord | None
    """The operator of the second record; None where that record has ended."""
    extra: OpRecord | None = None
    """An operator that only one side has, where the other side continues with the operator after it."""
    suspect: OpRecord | None = None
    """The operator of the suspect's side, if a suspect is known."""
    other_index: int | None = None
    """Position in the second record; None if it is the same."""

    def position(self, in_other: bool) -> int:
        """Return the position of the operator in the first or in the second record."""
        return self.index if self.other_index is None or not in_other else self.other_index

    @property
    def same_structure(self) -> bool:
        """True if both sides have the same operator."""
        return self.one is not None and self.other is not None and self.one.same_operator(self.other)

    @property
    def inputs_agree(self) -> bool:
        """True if both sides have the same input tensors and, for an operator that draws, the same generator state."""
        if self.one is None or self.other is None:
            return False
        return (self.one.inputs, self.one.generator) == (self.other.inputs, self.other.generator)

    @property
    def same_call(self) -> bool:
        """True if both sides called the same operator with the same numbers and settings."""
        if self.one is None or self.other is None:
            return False
        return self.same_structure and self.one.scalars == self.other.scalars

    @property
    def made_here(self) -> bool:
        """True if the operator itself made the difference: the same call on the same inputs gave other outputs."""
        return self.same_call and self.inputs_agree

    @property
    def record(self) -> OpRecord:
        """The operator, as one side recorded it."""
        record = self.extra or self.suspect or self.one or self.other
        assert record is not None
        return record


@dataclass(frozen=True)
class Witness:
    """The observations of one replica on a divergent step and on two replays of it."""

    original: Mapping[str, bytes]
    """Digest of each stage of the original step."""
    first: Mapping[str, bytes]
    """Digest of each stage of the first replay."""
    second: Mapping[str, bytes]
    """Digest of each stage of the second replay."""
    records: Sequence[OpRecord]
    """The operators of the first replay."""
    against_itself: OpDifference | None
    """The first operator at which the two replays differ; None if there is none."""
    contents: Contents
    """Digests of the tensors that the first replay began and ended with."""
    indices_intact: bool
    """True if the first replay used the sample indices that it was given."""
    generator: bytes
    """State of torch's CPU generator after the first replay."""
    generator_changed: bool
    """True if something other than an operator that draws changed the generator in the first replay."""
    sample_digests: Sequence[bytes]
    """One digest per sample of the batch, each loaded alone."""
    samples_are_random: bool = False
    """True if a sample depends on the state of the global generators."""
    loaded_by_workers: bool = False
    """True if worker processes loaded the original batch."""
    layout: bytes = b""
    """Digest of the memory layout of parameters, buffers and inputs, which their own digests leave out."""
    unreproduced: int | None = None
    """An earlier step that the replay does not reproduce; None if there is none."""
    indices_bits: int = 0
    """Bits in which the indices that the first replay used differ from those that it was given."""
    at_itself: Sequence[Finding] = ()
    """What differs at `against_itself`."""
    foreign: Foreign = field(default_factory=Foreign)
    """Code of this replica's process that replaces torch's own."""
    findings: Sequence[Finding] = ()
    """Findings of this replica alone, such as traces that code has left in the original step."""


@dataclass(frozen=True)
class Corruption:
    """Memory that no operator changed, to be compared element by element."""

    replica_id: int
    """The replica whose memory changed."""
    intact_id: int
    """A replica whose memory did not change."""
    index: int | None
    """The operator that read the memory; None if it was found at the step's end."""
    stage: str | None = None
    """The stage of the tensor that was found at the step's end; None for an operator's input."""
    tensor: str | None = None
    """The name of the tensor that was found at the step's end; None for an operator's input."""


@dataclass(frozen=True)
class Decision:
    """A cause with the evidence that it rests on."""

    cause: str
    """The code of the cause."""
    suspects: list[int]
    """Ids of the replicas that are probably wrong."""
    evidence: list[Evidence]
    """The observations that the cause rests on."""
    operator: OpDifference | None = None
    """The operator at which replicas diverge, if one is found."""
    sides: tuple[int, int] | None = None
    """Two replicas whose outputs of the operator differ, to be compared element by element."""
    replica_against_itself: int | None = None
    """A replica whose own two replays differ, to be compared with itself."""
    groups: list[list[int]] | None = None
    """Replica ids grouped by equal results; None leaves the comparison's groups."""
    positions: list[int] = field(default_factory=list)
    """Positions in the batch of the samples that differ."""
    corrupted: Corruption | None = None
    """Memory that no operator changed, if there is any."""
    settled: bool = False
    """True if the operator, run in float64, has determined the side that is wrong."""
    findings: Sequence[Finding] = ()
    """The findings, from which the rules name the cause."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of the findings."""
        return frozenset(finding.kind for finding in self.findings)


def with_findings(decision: Decision, *findings: Finding, **changes: Any) -> Decision:
    """Return a decision with more findings, whose lines are appended to its evidence.

    Args:
        decision: The decision so far.
        *findings: The findings to add.
        **changes: Fields of the decision to change.
    """
    lines = [line for finding in findings for line in finding.lines]
    evidence = [*decision.evidence, *lines]
    return replace(decision, **{"findings": [*decision.findings, *findings], "evidence": evidence, **changes})


def with_lines(decision: Decision, *lines: Evidence, **changes: Any) -> Decision:
    """Return a decision with more evidence that bears on no cause.

    Args:
        decision: The decision so far.
        *lines: The evidence to append.
        **changes: Fields of the decision to change.
    """
    return replace(decision, **{"evidence": [*decision.evidence, *lines], **changes})


def merge_findings(witnesses: Sequence[Witness], replicas: Sequence[int]) -> list[Finding]:
    """Return the findings of some replicas, without those of a kind that the other replicas have too.

    What every replica has found does not divide them.

    Args:
        witnesses: The observations of each replica, by replica id.
        replicas: The replicas whose findings count, such as those whose original step is not reproduced.
    """
    others = [frozenset(f.kind for f in row.findings) for r, row in enumerate(witnesses) if r not in replicas]
    everywhere = frozenset.intersection(*others) if others else frozenset()
    return [
        replace(finding, replicas=finding.replicas or [replica_id])
        for replica_id in replicas
        for finding in witnesses[replica_id].findings
        if finding.kind not in everywhere
    ]


_STAGES_OF_PHASE = {
    "forward": {"buffers", "output", "gradients"},
    "backward": {"buffers", "gradients"},
    "optimizer": {"gradients", "optimizer", "weights"},
}
"""Phase of an operator to the stages in which its result can show first."""


def could_have_made(record: OpRecord, stage: str | None) -> bool:
    """Return True if a divergence that first shows in `stage` may be in this operator's result."""
    return record.earlier or stage in _STAGES_OF_PHASE.get(record.phase, ())


def first_stage(rows: Sequence[Mapping[str, bytes]]) -> str | None:
    """Return the first stage in causal order whose digests differ between rows, or None."""
    return next((stage for stage in STAGES if len({row.get(stage) for row in rows}) > 1), None)


def up_to(stages: Mapping[str, bytes], last: str | None) -> bytes:
    """Join the digests of all stages up to and including `last`, or of all stages if it is None."""
    names = STAGES if last is None else STAGES[: STAGES.index(last) + 1]
    return b"".join(stages[name] for name in names if name in stages)


def first_difference(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> OpDifference | None:
    """Return the first operator at which two records differ in operator, call, inputs or outputs, or None."""
    return next(_differences(one, other), None)


def difference_behind(one: Sequence[OpRecord], other: Sequence[OpRecord], stage: str | None) -> OpDifference | None:
    """Return the first difference between two records that can explain a divergence in a stage.

    Two replicas may differ earlier, in a result that reaches no stage, and later, in something else. A difference in
    the samples or in a generator was made by no operator, but any operator may read or draw from it.

    Args:
        one: The operators of one run.
        other: The operators of the other run.
        stage: The first stage that differs.

    Returns:
        The difference, or None if no difference can explain it.
    """
    earlier: list[OpDifference] = []
    for place in _differences(one, other):
        if not _is_made(stage) or could_have_made(place.record, stage):
            return _behind_values(place, earlier)
        earlier.append(place)
    return None


def _behind_values(place: OpDifference, earlier: Sequence[OpDifference]) -> OpDifference:
    """Return the first difference if a number that was read from a tensor (`Tensor.item`) may lead from it to another.

    Python computes other arguments from such a number, or runs other operators.
    """
    rows = [*earlier, place]
    reads = any(row.one is not None and row.one.returned and not row.inputs_agree for row in rows)
    follows = not place.same_call or (place.one is not None and place.one.returned)
    return rows[0] if reads and follows else place


def _is_made(stage: str | None) -> bool:
    return any(stage in stages for stages in _STAGES_OF_PHASE.values())


def _differences(one: Sequence[OpRecord], other: Sequence[OpRecord]) -> Iterator[OpDifference]:
    """Yield all differences between two records, up to the first where they have different operators.

    A view computes nothing. It is a difference if the sides show other parts of a tensor and their numbers differ next.
    """
    views: list[OpDifference] = []
    skipped: tuple[int, int] | None = None
    at, found = (-1, -1), False
    for i, j in align(one, other):
        skipped = skipped or (None if i - at[0] == j - at[1] else (at[0] + 1, at[1] + 1))
        at = i, j
        place = _difference_at(one, other, at)
        if not place.same_structure:
            yield from views
            yield place
            return
        assert place.one is not None
        assert place.other is not None
        if place.one.is_view and place.other.is_view:
            views += [] if place.made_here and place.one.outputs == place.other.outputs else [place]
        elif not place.made_here or place.one.outputs != place.other.outputs:
            if skipped and not found and place.same_call and place.one.inputs != place.other.inputs:
                # No operator made these inputs: only code of the side with further operators can have changed them.
                yield _difference_at(one, other, skipped)
                return
            yield from views if not place.inputs_agree else ()
            views, found = [], True
            yield place
    yield from views
    if not found and not views and (skipped or len(one) != len(other)):
        yield _difference_at(one, other, skipped or (at[0] + 1, at[1] + 1))


def _difference_at(one: Sequence[OpRecord], other: Sequence[OpRecord], at: tuple[int, int]) -> OpDifference:
    a, b = (side[position] if position < len(side) else None for side, position in zip((one, other), at, strict=True))
    place = OpDifference(at[0], a, b, other_index=None if at[0] == at[1] else at[1])
    side = None if place.same_structure else extra_side(one, other, at)
    return place if side is None else replace(place, extra=(a, b)[side])
