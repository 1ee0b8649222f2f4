"""Verdicts of `dreplica.diagnose` where no decision on replays is needed, and the parts that all of them share."""

from collections.abc import Mapping, Sequence

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import describe, first_difference
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.diagnosis.decision.code_remedies import as_code
from dreplica.diagnosis.decision.conclude import conclude
from dreplica.diagnosis.decision.decide_layout import explained_by_order
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.replay.start import Start
from dreplica.diagnosis.replay.state_layout import LayoutDifferences
from dreplica.distributed.attempt import AttemptFailed
from dreplica.distributed.channel import Channel
from dreplica.state.stages import Stage


def diverged(found: Verdict | None, how: str, rows: Sequence[Mapping[str, Stage]]) -> Verdict:
    """Return the verdict on replays that differ between replicas, with the step and remedies of `found`.

    Args:
        found: The verdict of the divergence to explain, if there is one.
        how: The beginning of the summary.
        rows: Each replica's stages.
    """
    place = first_difference([0] * len(rows), rows)
    where = ", ".join(part for part in (place.stage, place.tensor) if part)
    summary = f"{how}: {where}; groups {place.groups}"
    verdict = describe(place, None, len(rows)).with_(summary=summary, step=None, remedy=[])
    return verdict if found is None else verdict.with_(step=found.step, epoch=found.epoch)


def unexplained(found: Verdict | None, channel: Channel, summary: str, lines: Sequence[Evidence]) -> Verdict:
    """Return the verdict without a cause, except one that the comparison has found already.

    Args:
        found: The verdict of the divergence to explain, if there is one.
        channel: The control channel between all replicas.
        summary: The summary where there is no `found`.
        lines: The evidence of the diagnosis.
    """
    if found is not None:
        return found.with_(remedy=kept_remedies(found), evidence=[*found.evidence, *lines])
    return Verdict(False, "unexplained", summary, groups=[list(range(channel.size))], evidence=list(lines))


def kept_remedies(found: Verdict | None) -> list[Remedy]:
    """Return the remedies of the comparison, except to diagnose the step, which has been done."""
    return [] if found is None else [remedy for remedy in found.remedy if remedy.code != "diagnose-step"]


def failed(found: Verdict | None, channel: Channel, error: AttemptFailed) -> Verdict:
    """Return the verdict on a step that raises on some replica.

    Args:
        found: The verdict of the divergence to explain, if there is one.
        channel: The control channel between all replicas.
        error: What was raised.
    """
    line = Evidence.of("replay-failed", error=error)
    return unexplained(found, channel, "the step could not be replayed", [line])


def all_agree(
    found: Verdict | None, channel: Channel, start: Start, lines: Sequence[Evidence], layouts: LayoutDifferences
) -> Verdict:
    """Return the verdict on a step that gives the same result on every replica, both times.

    Args:
        found: The verdict of the divergence to explain, if there is one.
        channel: The control channel between all replicas.
        start: The state from which the step was replayed.
        lines: The evidence so far.
        layouts: The differences between the replicas' layouts.
    """
    order = layouts.order
    lines = [*lines, *(line for line in (order, layouts.modes) if line is not None)]
    if order is not None and explained_by_order(found):
        groups = split_into_groups([repr(name).encode() for name in order.data["names"]])
        summary = "replicas hold the same values under the same names, in different orders"
        own = Verdict(False, "order-differs", f"{summary}; groups {groups}", stage=order.data["stage"], groups=groups)
        verdict = found or own.with_(suspects=suspects_of(groups))
        return verdict.with_(cause="order-differs", remedy=[], evidence=[*verdict.evidence, *lines])
    if found is not None:
        code = "step-agrees-equalised" if start.equalised else "step-agrees-own"
        verdict = unexplained(found, channel, "", [*lines, Evidence.of(code)])
        return verdict if start.kept else verdict.with_(remedy=[*verdict.remedy, Remedy.of("keep-state")])
    replicas = f"{channel.size} replica{'s' * (channel.size > 1)}"
    summary = f"{replicas}: from one state, the step gives bit-identical results on each, both times"
    return Verdict(True, "none", summary, groups=[list(range(channel.size))], evidence=lines)


def finish(verdict: Verdict, facts: RunFacts) -> Verdict:
    """Complete a verdict with explanation and remedies, as lines of Python where they are settings of the trainer."""
    if verdict.agreed:
        return verdict
    concluded = conclude(verdict, facts)
    return concluded.with_(remedy=as_code(concluded.remedy))
