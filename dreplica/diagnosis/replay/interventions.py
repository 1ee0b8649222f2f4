"""Interventions: make one thing equal on all replicas, replay the step, and see whether the divergence is gone."""

from collections.abc import Mapping, Sequence

from dreplica.diagnosis.replay.own_values import DifferingValue, Section
from dreplica.diagnosis.replay.replay_step import Repeated
from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.stages import STAGES, Stage

_MOST_SINGLE = 12
"""Values of a section that are tried one by one."""


def try_equal(
    repeated: Repeated,
    values: Sequence[DifferingValue],
    always: Sequence[DifferingValue],
    channel: Channel,
    last: str | None = None,
) -> list[DifferingValue]:
    """Find the values that make the step agree on all replicas when they are made equal.

    Args:
        repeated: Replays the step. It is left with its own values.
        values: The values that differ between replicas, one of which may be the cause.
        always: Values that are equal in all trials.
        channel: The control channel between all replicas.
        last: The last stage, in causal order, that has to agree. None for all stages.

    Returns:
        The values that must be equal for the step to agree, as few as possible. Empty if no values make it agree.

    Note:
        Collective: call on every rank.
    """

    def agrees(chosen: Sequence[DifferingValue]) -> bool:
        equal = [*always, *chosen]
        repeated.equal = equal
        made = channel.gather(attempt(channel, repeated.again).stages)
        draws_own = any(each.section is Section.GENERATORS and each not in equal for each in [*always, *values])
        stage = first_stage_between(made, draws_own)
        return stage is None or (last is not None and STAGES.index(stage) > STAGES.index(last))

    try:
        if not values or not agrees(values):
            return []
        needed = list(values)
        for section in Section:
            rest = [each for each in needed if each.section is not section]
            if rest and len(rest) < len(needed) and agrees(rest):
                needed = rest
        for section in Section:
            single = [each for each in needed if each.section is section]
            if 1 < len(single) <= _MOST_SINGLE:
                for each in single:
                    rest = [other for other in needed if other is not each]
                    if rest and agrees(rest):
                        needed = rest
        return needed
    finally:
        repeated.equal = list(always)


def first_stage_between(rows: Sequence[Mapping[str, Stage]], draws_own: bool) -> str | None:
    """Return the first stage, in causal order, that differs between replicas, or None.

    Args:
        rows: Each replica's stages.
        draws_own: True if replicas have their own generators, which are then not compared.
    """
    names = [name for name in STAGES if not (draws_own and name == "rng")]
    return next((name for name in names if len({row[name].digest if name in row else b"" for row in rows}) > 1), None)
