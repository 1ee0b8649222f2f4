"""The comparison of what replicas hold: with each other and with a reference, one of them under way at a time."""

from dataclasses import dataclass, field

from dreplica.agreement import protocol
from dreplica.agreement.hasher import Hasher, Observation
from dreplica.agreement.reference import Apart, Reference, describe_apart
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.location import describe, describe_algorithms
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.channel import Channel, Posted
from dreplica.state.fingerprint.stage import Stage


@dataclass
class _UnderWay:
    step: int
    epoch: int | None
    observation: Observation
    word: protocol.Word
    wants_stop: bool
    phase: str | None
    recorded: bool
    posted: Posted | None = field(default=None, init=False)
    """None: not yet, since the device is still computing the word."""
    apart: Apart | None = field(default=None, init=False)
    """On rank 0, its difference from the reference."""


@dataclass(frozen=True)
class Compared:
    """A comparison that has come to its end; but for `stages` and `own_apart` the same on all replicas."""

    step: int
    epoch: int | None
    phase: str | None
    recorded: bool
    stages: dict[str, Stage]
    """This replica's."""
    outcome: protocol.Outcome
    """The reference is looked at until the first difference, be it from it or between replicas."""
    own_apart: Apart | None
    """The difference from the reference, on rank 0."""


class Exchange:
    """What goes to and fro between replicas. Its methods but `start` are collectives, and so is that if nothing lags.

    Args:
        channel: between all replicas.
        hasher: that takes the fingerprints.
        trace: where comparisons are recorded.
        reference: a recorded run, on rank 0.
        ddp: whether replicas are the ranks of one data-parallel model.
    """

    def __init__(
        self, channel: Channel, hasher: Hasher, trace: TraceWriter, reference: Reference | None, ddp: bool
    ) -> None:
        self._channel, self._hasher, self._trace = channel, hasher, trace
        self._reference, self._ddp = reference, ddp
        self._under_way: _UnderWay | None = None

    def start(
        self,
        step: int,
        epoch: int | None,
        observation: Observation,
        wants_stop: bool,
        phase: str | None,
        recorded: bool,
    ) -> protocol.Word:
        """Starts a comparison, when the one before is complete. Returns the word that stands for this replica's stages.

        `phase`: `evaluation`, or None; `recorded`: whether it goes into the trace.
        """
        assert self._under_way is None
        word = protocol.Word(lambda: protocol.fold(step, observation.stages))
        self._under_way = _UnderWay(step, epoch, observation, word, wants_stop, phase, recorded)
        # Whether it is ready yet, replicas may see differently, and they must post in the same order as they gather.
        if not self._hasher.is_asynchronous:
            self._post(self._under_way)
        return word

    def _post(self, under_way: _UnderWay) -> Posted:
        """Sends this replica's part; waits for the device, where it is still computing."""
        if self._reference is not None and under_way.recorded:
            is_evaluation = under_way.phase is not None
            under_way.apart = self._reference.compare(under_way.step, is_evaluation, under_way.observation.stages)
        differs = under_way.apart is not None
        under_way.posted = protocol.post(self._channel, under_way.word.value, under_way.wants_stop, differs)
        return under_way.posted

    def complete(self) -> Compared | None:
        """Completes the comparison that is under way; None if none is."""
        done, self._under_way = self._under_way, None
        if done is None:
            return None
        outcome = protocol.read(self._channel, done.posted or self._post(done))
        stages = done.observation.stages
        if stages and done.recorded:
            self._trace.step(done.step, done.epoch, outcome.agreed, stages)
        if not outcome.agreed or outcome.apart:
            self._reference = None
        return Compared(done.step, done.epoch, done.phase, done.recorded, stages, outcome, done.apart)

    def describe(self, compared: Compared) -> tuple[Verdict, Apart | None]:
        """What replicas differ in or, where they agree, in what they differ from the reference."""
        size = self._channel.size
        if compared.outcome.agreed:
            apart: Apart = self._channel.gather(compared.own_apart)[0]
            return describe_apart(apart, compared.epoch, size), apart
        algorithms = self._channel.gather(self._hasher.algorithm)
        if len(set(algorithms)) > 1:
            return describe_algorithms(compared.step, algorithms), None
        place = protocol.locate(self._channel, compared.step, compared.stages, compared.phase)
        return describe(place, compared.epoch, size, self._ddp), None
