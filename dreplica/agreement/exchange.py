"""Comparison of digests between replicas and with a reference, one comparison in progress at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreplica.agreement import protocol
from dreplica.agreement.generators import compare_states, seed_commands
from dreplica.agreement.hasher import Hasher, Observation
from dreplica.agreement.mesh import keyed_sum
from dreplica.agreement.mesh.description import describe_located
from dreplica.agreement.mesh.shards import EntrySplits, Shards
from dreplica.agreement.reference import Reference, ReferenceDifference, describe_difference
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.values import STAGES_OF_STATE, describe_forms, describe_values, drawn_on_some
from dreplica.agreement.verdict.advice import advise
from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import Place, describe, describe_algorithms
from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.verdict.signs import Sign
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.channel import Channel, Posted
from dreplica.state.fingerprint.stage import Stage


@dataclass(frozen=True)
class OwnEntries:
    """What this replica knows of entries that differ, where they still are those that were compared."""

    values: Mapping[str, str] = field(default_factory=dict)
    """Values, as text, of the first of those that are single numbers."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Element types and shapes of the first of those that are tensors."""
    states: Mapping[str, Any] = field(default_factory=dict)
    """States of generators, for the stage `rng`."""


ReadEntries = Callable[[str, Sequence[str]], OwnEntries]
"""Reads the entries of a stage with the given names."""


@dataclass
class _InProgress:
    step: int
    epoch: int | None
    observation: Observation
    combined: protocol.CombinedDigest
    wants_stop: bool
    phase: str | None
    recorded: bool
    not_drawn: frozenset[str]
    posted: Posted | None = field(default=None, init=False)
    """The posted message; None while the device is still computing the combined digest."""
    own_difference: ReferenceDifference | None = field(default=None, init=False)
    """On rank 0, the difference from the reference."""


@dataclass(frozen=True)
class Compared:
    """A completed comparison, the same on all replicas except `stages` and `own_difference`."""

    step: int
    epoch: int | None
    phase: str | None
    recorded: bool
    stages: dict[str, Stage]
    """This replica's digests."""
    outcome: protocol.Outcome
    """The result. The reference is compared only until the first difference, from it or between replicas."""
    own_difference: ReferenceDifference | None
    """On rank 0, the difference from the reference."""
    not_drawn: frozenset[str]
    """The generators that nothing had drawn from on this replica."""
    splits: EntrySplits = field(default_factory=dict)
    """On a device mesh, stage to the axes over which each entry is split."""


class Exchange:
    """Messages between replicas.

    Note:
        All methods are collectives, except `start` with an asynchronous hasher.

    Args:
        channel: The control channel between all replicas.
        hasher: What computes the fingerprints.
        trace: Where comparisons are recorded.
        reference: A recorded run to compare with, on rank 0.
        signs: What is known of the run that remedies depend on: see `Sign`.
        unseeded: Names of the generators that differed between replicas before the first step.
        with_advice: True to suggest remedies, where no diagnosis follows.
        shards: The parts of tensors that this rank of a mesh holds. None if all ranks are to hold the same.
    """

    def __init__(
        self,
        channel: Channel,
        hasher: Hasher,
        trace: TraceWriter,
        reference: Reference | None,
        signs: Collection[Sign] = (),
        unseeded: Collection[str] = (),
        with_advice: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self._channel, self._hasher, self._trace = channel, hasher, trace
        self._reference, self._signs, self._unseeded = reference, signs, unseeded
        self._with_advice, self._shards = with_advice, shards
        self._in_progress: _InProgress | None = None

    def start(
        self,
        step: int,
        epoch: int | None,
        observation: Observation,
        wants_stop: bool,
        phase: str | None,
        recorded: bool,
        not_drawn: frozenset[str] = frozenset(),
    ) -> protocol.CombinedDigest:
        """Start a comparison, once the one before is complete.

        Args:
            step: The training step.
            epoch: The epoch, for the trace.
            observation: The digests to compare.
            wants_stop: True if this replica wants to stop.
            phase: "evaluation" or None.
            recorded: True if the comparison goes into the trace.
            not_drawn: The generators that nothing has drawn from so far.

        Returns:
            The combined digest of this replica's stages.
        """
        assert self._in_progress is None
        combined = protocol.CombinedDigest(lambda: protocol.fold(step, observation.stages))
        self._in_progress = _InProgress(step, epoch, observation, combined, wants_stop, phase, recorded, not_drawn)
        # An asynchronous digest may be ready on one replica and not on another. All must post before they gather, in
        # the same order, so such a digest is always posted when the comparison is completed.
        if not self._hasher.is_asynchronous:
            self._post(self._in_progress)
        return combined

    def _post(self, current: _InProgress) -> Posted:
        """Send this replica's message, once its device has computed the digests."""
        if self._reference is not None and current.recorded:
            is_evaluation = current.phase is not None
            current.own_difference = self._reference.compare(
                current.step, is_evaluation, current.observation.stages, current.not_drawn
            )
        differs = current.own_difference is not None
        if self._shards is None:
            current.posted = protocol.post(self._channel, current.combined.value, current.wants_stop, differs)
        else:
            observation = current.observation
            digests = self._shards.digests(current.step, observation.stages, observation.splits)
            message = keyed_sum.message(digests, current.wants_stop, differs)
            current.posted = self._channel.post_sum(message)
        return current.posted

    def _read(self, posted: Posted) -> protocol.Outcome:
        if self._shards is None:
            return protocol.read(self._channel, posted)
        return keyed_sum.outcome(self._channel.wait(posted))

    def complete(self) -> Compared | None:
        """Complete and record the comparison in progress, or return None if there is none."""
        done, self._in_progress = self._in_progress, None
        if done is None:
            return None
        outcome = self._read(done.posted or self._post(done))
        stages = done.observation.stages
        if stages and done.recorded:
            is_evaluation = done.phase is not None
            given = done.step, done.epoch, outcome.agreed, stages
            self._trace.step(*given, is_evaluation=is_evaluation, not_drawn=done.not_drawn)
        if not outcome.agreed or outcome.differs_from_reference:
            self._reference = None
        own, not_drawn = done.own_difference, done.not_drawn
        splits = done.observation.splits
        return Compared(done.step, done.epoch, done.phase, done.recorded, stages, outcome, own, not_drawn, splits)

    def describe(
        self, compared: Compared, read: ReadEntries, owners: Callable[[Sequence[str]], dict[str, str]]
    ) -> tuple[Verdict, ReferenceDifference | None]:
        """Return the verdict on a difference between replicas or, if they agree, from the reference.

        Args:
            compared: The comparison.
            read: Reads entries of this replica, where they still are those that were compared.
            owners: Returns the modules that hold parameters of the optimizer which are not the model's.
        """
        size = self._channel.size
        if compared.outcome.agreed:
            difference: ReferenceDifference = self._channel.gather(compared.own_difference)[0]
            return describe_difference(difference, compared.epoch, size), difference
        algorithms = self._channel.gather(self._hasher.algorithm)
        if len(set(algorithms)) > 1:
            return describe_algorithms(compared.step, algorithms), None
        if self._shards is not None:
            located = self._shards.locate(
                self._channel, compared.step, compared.stages, compared.splits, compared.phase
            )
            verdict = describe_located(located, self._shards.axes, compared.epoch, self._with_advice)
            return self._with_settings(verdict, located.place, read), None
        place = protocol.locate(self._channel, compared.step, compared.stages, compared.phase)
        verdict = describe(place, compared.epoch, size)
        if place.stage is not None:
            own = read(place.stage, place.differing)
            rows, not_drawn = zip(*self._channel.gather((own, sorted(compared.not_drawn))), strict=True)
            more = [
                *describe_values(place.differing, [row.values for row in rows]),
                *describe_forms(place.differing, [row.forms for row in rows]),
                *drawn_on_some(place.generators, not_drawn),
            ]
            if place.stage in STAGES_OF_STATE and any(line.code == "tensor-forms-differ" for line in more):
                verdict = verdict.with_(cause="structure-differs")
            if place.stage == "rng" and not place.is_structural:
                apart = compare_states(place.generators, [row.states for row in rows])
                more += apart
                verdict = verdict.with_(cause="generators-differ") if apart else verdict
            unseeded = [name for name in place.generators if name in self._unseeded]
            if unseeded and place.stage in ("batch", "rng"):
                data = {"generators": unseeded, "command": seed_commands(unseeded)}
                more.append(Evidence.of("generators-unseeded", **data))
            outside = verdict.signs.get(Sign.OUTSIDE_PARAMETERS)
            if outside:
                more.append(self._name_outside(outside, owners))
            verdict = verdict.with_(
                evidence=[*verdict.evidence[:1], *more, *verdict.evidence[1:]],
                signs=verdict.signs | {sign: [] for sign in self._signs},
            )
        if self._with_advice:
            known = list(CAUSES[verdict.cause].remedy) if verdict.cause != "unexplained" else []
            verdict = verdict.with_(remedy=advise(verdict) or known)
        return verdict, None

    def _with_settings(self, verdict: Verdict, place: Place, read: ReadEntries) -> Verdict:
        """Return the verdict on a mesh with the values and the remedies of settings that differ."""
        if verdict.cause != "hyperparameter-differs" or place.stage is None:
            return verdict
        rows = self._channel.gather(read(place.stage, place.differing).values)
        members = {rank for ids in place.groups for rank in ids}
        lines = describe_values(place.differing, [row if rank in members else {} for rank, row in enumerate(rows)])
        verdict = verdict.with_(
            evidence=[*verdict.evidence[:1], *lines, *verdict.evidence[1:]],
            signs=verdict.signs | {sign: [] for sign in self._signs},
        )
        return verdict.with_(remedy=advise(verdict) or verdict.remedy) if self._with_advice else verdict

    def _name_outside(self, names: Sequence[str], owners: Callable[[Sequence[str]], dict[str, str]]) -> Evidence:
        """Return the evidence that names parameters which are not the model's, by the module that holds them."""
        rows = self._channel.gather(owners(names))
        held = {name: next((row[name] for row in rows if name in row), None) for name in names}
        labels = [f"{held[name]} ({name})" if held[name] else name for name in names]
        return Evidence.of("parameters-outside", some=list_names(labels), owners=held)
