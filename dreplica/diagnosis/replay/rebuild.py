"""Repeated builds of a replica from its own seed, with every operator and random draw recorded."""

from collections.abc import Callable
from dataclasses import dataclass

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.evidence.observation import OpDifference, first_difference
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.stages import buffers_stage, rng_stage, weights_stage


@dataclass(frozen=True)
class Rebuilt:
    """The observations of repeated builds on one replica."""

    records: list[OpRecord]
    """Operators of the first repeated build."""
    reproducible: bool
    """True if both repeated builds have the same weights, buffers and generator states."""
    against_itself: OpDifference | None
    """The first operator that differs between the two repeated builds."""


def rebuild(build: Callable[[], Replica], seed: int) -> Rebuilt:
    """Build a replica twice more from a seed, and restore the global generators."""
    before = get_rng_state()
    try:
        first, second = (_build_once(build, seed) for _ in range(2))
    finally:
        set_rng_state(before)
    return Rebuilt(first[0], first[1] == second[1], first_difference(first[0], second[0]))


def explain_build(found: Verdict, rebuilt: Rebuilt, channel: Channel) -> Verdict:
    """Add the observations of repeated builds to a verdict on the build.

    Args:
        found: The verdict, which names the groups of replicas.
        rebuilt: This replica's observations.
        channel: The control channel between all replicas.

    Returns:
        The verdict with the operator or draw at which builds diverge. Its cause is `build-not-seeded` if a replica does
        not reproduce itself.

    Note:
        Collective: call on every rank.
    """
    rows: list[Rebuilt] = channel.gather(rebuilt)
    random_ones = [replica_id for replica_id, row in enumerate(rows) if not row.reproducible]
    if random_ones:
        line = Evidence.of("rebuild-varies", replicas=random_ones)
        place = rows[random_ones[0]].against_itself
        remedy = [Remedy.of("draw-from-global-generators"), Remedy.of("seed-own-generator")]
        reseeded = found.with_(cause="build-not-seeded", remedy=remedy)
        return _add(reseeded, line, place, ("in one build", "in the next"))
    one, other = (ids[0] for ids in found.groups[:2])
    place = first_difference(rows[one].records, rows[other].records)
    sides = (f"on replica {one}", f"on replica {other}")
    return _add(found, Evidence.of("rebuild-reproduces"), place, sides)


def _add(found: Verdict, line: Evidence, place: OpDifference | None, whose: tuple[str, str]) -> Verdict:
    if place is None:
        return found.with_(evidence=[*found.evidence, line, Evidence.of("rebuild-operators-agree")])
    sides = [
        f"{record.name} at {record.source or 'unknown'} {where}" if record else f"no further operator {where}"
        for record, where in zip((place.one, place.other), whose, strict=True)
    ]
    diverges = Evidence.of("rebuild-diverges", index=place.index, one=sides[0], other=sides[1])
    return found.with_(operator=place.record.name, phase="build", evidence=[*found.evidence, line, diverges])


def _build_once(build: Callable[[], Replica], seed: int) -> tuple[list[OpRecord], tuple[bytes, ...]]:
    seed_generators(seed)
    with OpTracer(generators=True) as tracer:
        replica = build()
    model = replica.model
    return tracer.records, (weights_stage(model).digest, buffers_stage(model).digest, rng_stage().digest)
