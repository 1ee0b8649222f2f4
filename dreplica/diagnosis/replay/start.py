"""The state from which a custom step is replayed: the one that it had, or the present one with equal tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dreplica.agreement.kept_state import Original
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import first_difference
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups
from dreplica.diagnosis.replay.own_values import DifferingValue, find_differing_values
from dreplica.diagnosis.replay.replay_step import Repeated
from dreplica.diagnosis.replay.shared_state import share_tensors, tensor_stages
from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel


@dataclass(frozen=True)
class Start:
    """The start of all replays."""

    lines: Sequence[Evidence]
    """What was made equal."""
    equalised: bool
    """True if tensors differed between replicas and were made equal."""
    kept: bool
    """True if the state is the one that the original step had."""
    present_is_original: bool
    """True if this replica's state from before the replays is still that of the original step."""
    writes: Mapping[str, int]
    """Steps of the version counters of tensors in the original step. Empty where they are not known."""
    is_ddp: bool
    """True if replicas are the ranks of one data-parallel model, each with its own batch."""
    values: Sequence[DifferingValue]
    """Values that differ between replicas, and may be the cause."""
    always: Sequence[DifferingValue]
    """Values that differ now, but cannot be the cause: they were equal in the original step."""


def begin(repeated: Repeated, original: Original | None, found: Verdict | None, channel: Channel) -> Start:
    """Restore the state that the step had, or else make the tensors of all replicas equal.

    Everything but tensors remains each replica's own. Gradients that the diverged step has left are cleared.

    Args:
        repeated: Replays the step.
        original: What the `Agreement` knows of the original step, if it was passed.
        found: The verdict of the divergence to explain, if there is one.
        channel: The control channel between all replicas.

    Note:
        Collective: call on every rank.

    Raises:
        AttemptFailed: Some replica's state cannot be read or written. It is raised on all replicas.
    """
    before = original.before if original is not None else None
    present = attempt(channel, lambda: original is not None and _is_intact(original))
    writes = original.versions.steps() if original is not None and original.versions is not None else {}
    kept = all(channel.gather(before is not None))
    if kept and before is not None:
        attempt(channel, lambda: repeated.restore(before))
    states = channel.gather(attempt(channel, lambda: tensor_stages(repeated.parts)))
    groups = split_into_groups([b"".join(stage.digest for stage in row.values()) for row in states])
    source, lines = groups[0][0], []
    if len(groups) > 1:
        place = first_difference([0] * channel.size, states)
        share_tensors(repeated.parts, source, channel)
        where = f"{place.stage}, {place.tensor}" if place.tensor else place.stage
        lines.append(Evidence.of("state-shared", place=where, replica=source))
        if kept:
            lines.append(Evidence.of("state-differed-before", place=where))
    if not kept:
        attempt(channel, repeated.clear_gradients)
    attempt(channel, repeated.begin)
    values = find_differing_values(repeated.parts, source, channel)
    drawn_alike = found is not None and len(found.stage_groups.get("rng", ())) == 1
    always = [each for each in values if each.is_global_generator and drawn_alike and not kept]
    own = [each for each in values if each not in always]
    return Start(lines, len(groups) > 1, kept, present, writes, _is_ddp(found, original), own, always)


def _is_intact(original: Original) -> bool:
    """Return True if the present state is the one that was compared."""
    return all(stage.digest == original.stages[name].digest for name, stage in original.observe().items())


def _is_ddp(found: Verdict | None, original: Original | None) -> bool:
    if original is not None:
        return original.is_ddp
    return found is not None and any(remedy.code.startswith("ddp-") for remedy in found.remedy)
