"""Replays of a custom step with each replica's own values, and with those made equal that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreplica.agreement.kept_state import Original
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups
from dreplica.diagnosis.evidence.finding import Finding
from dreplica.diagnosis.evidence.observation import first_stage
from dreplica.diagnosis.replay.interventions import try_equal
from dreplica.diagnosis.replay.own_values import DifferingValue, Section
from dreplica.diagnosis.replay.replay_run import Replayed
from dreplica.diagnosis.replay.replay_step import Repeated
from dreplica.diagnosis.replay.reproduction import Reproduction, compare_with_original, examine
from dreplica.diagnosis.replay.start import Start
from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.stages import STAGES, Stage

_COLLECTIVES = ("c10d.", "_c10d_functional.")


@dataclass(frozen=True)
class Runs:
    """Two replays on this replica, and what all replicas have gathered of them."""

    first: Replayed
    """The first replay."""
    second: Replayed
    """The second replay, from the same state."""
    rows: Sequence[Mapping[str, Stage]]
    """Each replica's stages after the first replay."""
    stage: str | None
    """The first stage that differs between replicas after the first replay, or None."""
    repeats: bool
    """True if both replays are equal on every replica."""
    collectives: Sequence[str]
    """Names of the collectives that the step has called on any replica."""


@dataclass(frozen=True)
class OwnRuns:
    """The replays that a decision rests on, and the values that were made equal on the way."""

    runs: Runs
    """Two replays: with own values if these explain the divergence, otherwise with all of them made equal."""
    needed: Sequence[DifferingValue] = ()
    """Values that must be equal for the step to agree. Empty if no values make it agree."""
    without_effect: Sequence[DifferingValue] = ()
    """Values that were made equal, and the replicas diverge nevertheless."""
    equalised: Sequence[Evidence] = ()
    """Evidence on values that were made equal since they cannot be the cause."""
    reproductions: Sequence[Mapping[str, Reproduction]] = ()
    """Each replica's comparison with its original step. Empty if it is unknown."""
    findings: Sequence[Finding] = field(default_factory=list)
    """What this replica has found in the tensors of its original step."""


def run_with_own(
    repeated: Repeated, start: Start, found: Verdict | None, original: Original | None, channel: Channel
) -> OwnRuns:
    """Replay the step with each replica's own values and, if it diverges, with values made equal.

    Args:
        repeated: Replays the step. It is left as for the replays that are returned.
        start: The state from which it is replayed.
        found: The verdict of the divergence to explain, if there is one.
        original: The original step, if the state that it had was kept.
        channel: The control channel between all replicas.

    Note:
        Collective: call on every rank.

    Raises:
        AttemptFailed: The step raises on some replica. It is raised on all replicas.
    """
    values, always = list(start.values), list(start.always)
    drawn = [each for each in values if each.section is Section.GENERATORS]
    draws_own = bool(drawn) and not (found is not None and found.stage == "rng")
    repeated.equal = always
    reproduction: dict[str, Reproduction] = {}
    findings: list[Finding] = []

    def replay() -> tuple[Replayed, Replayed]:
        first = repeated.again()
        if original is not None and start.kept and not start.equalised and not original.is_ddp:
            after = original.observe()
            reproduction.update(compare_with_original(original, after, repeated.returned))
            if start.present_is_original and found is not None:
                happened = repeated.aftermath(repeated.present, start.writes)
                replayed = repeated.aftermath(None, repeated.writes)
                sides = happened, replayed, repeated.aftermath(repeated.before, {})
                findings.extend(examine(original, after, reproduction, found.stage, sides, channel.rank))
        return first, repeated.again()

    own = _gather(*attempt(channel, replay), channel, draws_own)
    reproductions = [] if start.equalised else [row for row in channel.gather(reproduction) if row]
    done = OwnRuns(own, reproductions=reproductions, findings=findings)
    if own.collectives or not own.repeats or own.stage is None or not values:
        return done
    if drawn and (start.is_ddp or not start.kept):
        # Ranks of a data-parallel model draw for themselves, and present generators may differ since the divergence.
        needed = try_equal(repeated, drawn, always, channel)
        if needed:
            return OwnRuns(own, needed)
        always += drawn
        values = [each for each in values if each not in drawn]
    agreed = [] if start.kept or start.is_ddp else _agreed_before(found)
    runs = own
    equalised: list[Evidence] = []
    while runs.stage in agreed:
        needed = try_equal(repeated, values, always, channel, last=runs.stage)
        if not needed:
            break
        equalised.append(
            Evidence.of("values-equalised", what=list_names([each.name for each in needed]), stage=runs.stage)
        )
        always += needed
        values = [each for each in values if each not in needed]
        repeated.equal = always
        runs = _run(repeated, channel)
    if runs.stage is None:
        return OwnRuns(runs, equalised=equalised)
    if len(always) > len(start.always) and runs is own:
        repeated.equal = always
        runs = _run(repeated, channel)
    needed = try_equal(repeated, values, always, channel)
    if needed or not values:
        return OwnRuns(runs, needed, equalised=equalised)
    repeated.equal = [*always, *values]
    return OwnRuns(_run(repeated, channel), without_effect=values, equalised=equalised)


def _agreed_before(found: Verdict | None) -> list[str]:
    """Return the stages that were compared and had agreed, before the one that had diverged."""
    if found is None or found.stage not in STAGES:
        return []
    earlier = STAGES[: STAGES.index(found.stage)]
    return [stage for stage in earlier if len(found.stage_groups.get(stage, ())) == 1]


def _run(repeated: Repeated, channel: Channel) -> Runs:
    first, second = attempt(channel, lambda: (repeated.again(), repeated.again()))
    return _gather(first, second, channel, draws_own=False)


def _gather(first: Replayed, second: Replayed, channel: Channel, draws_own: bool) -> Runs:
    """Gather two replays. Where replicas have their own generators, the states of these are not compared."""
    if draws_own:
        for run in (first, second):
            run.stages.pop("rng", None)
    used = sorted({record.name for record in first.tracer.records if record.name.startswith(_COLLECTIVES)})
    ones, others, names = zip(*channel.gather((first.stages, second.stages, used)), strict=True)
    if len(groups_of(ones)) == 1 < len(groups_of(others)):
        first, second, ones, others = second, first, others, ones
    pairs = zip(ones, others, strict=True)
    return Runs(
        first,
        second,
        rows=ones,
        stage=first_stage([digests_of(row) for row in ones]),
        repeats=all(digests_of(one) == digests_of(other) for one, other in pairs),
        collectives=sorted(set().union(*names)),
    )


def digests_of(stages: Mapping[str, Stage]) -> dict[str, bytes]:
    """Return the digest of each stage."""
    return {name: stage.digest for name, stage in stages.items()}


def groups_of(rows: Sequence[Mapping[str, Stage]]) -> list[list[int]]:
    """Group replicas by equal stages."""
    return split_into_groups([b"".join(stage.digest for stage in row.values()) for row in rows])
