"""Repeated builds of a replica from its own seed, with every operator and random draw recorded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import OpDifference, first_difference
from dreplica.diagnosis.evidence.place import Side, findings_between, findings_of_replays
from dreplica.diagnosis.tracing.memory_tracker import Unwritten
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.stages import buffers_stage, named_buffers, named_weights, rng_stage, weights_stage


@dataclass(frozen=True)
class Rebuilt:
    """The observations of repeated builds on one replica."""

    records: list[OpRecord]
    """Operators of the first repeated build."""
    reproducible: bool
    """True if both repeated builds have the same weights, buffers and generator states."""
    against_itself: OpDifference | None
    """The first operator that differs between the two repeated builds."""
    at_itself: Sequence[Finding] = ()
    """What differs at `against_itself`."""
    unwritten: Mapping[str, Unwritten] = field(default_factory=dict)
    """Parameters and buffers with memory that the first repeated build allocated and nothing wrote, by name."""


def rebuild(build: Callable[[], Replica], seed: int) -> Rebuilt:
    """Build a replica twice more from a seed, and restore the global generators."""
    before = get_rng_state()
    try:
        first, second = (_build_once(build, seed) for _ in range(2))
    finally:
        set_rng_state(before)
    itself = first_difference(first.records, second.records)
    findings = findings_of_replays(itself, first.records, second.records, frozenset())
    return Rebuilt(first.records, first.state == second.state, itself, findings, first.unwritten)


def explain_build(found: Verdict, rebuilt: Rebuilt, channel: Channel) -> Verdict:
    """Add the observations of repeated builds to a verdict on the build.

    Args:
        found: The verdict, which names the groups of replicas.
        rebuilt: This replica's observations.
        channel: The control channel between all replicas.

    Returns:
        The verdict with the operator or draw at which builds diverge. Its cause is `uninitialized-memory` if what
        differs was never written, and `build-not-seeded` if a replica does not reproduce itself.

    Note:
        Collective: call on every rank.
    """
    rows: list[Rebuilt] = channel.gather(rebuilt)
    random_ones = [replica_id for replica_id, row in enumerate(rows) if not row.reproducible]
    if random_ones:
        line = Evidence.of("rebuild-varies", replicas=random_ones)
        row = rows[random_ones[0]]
        place, findings, sides = row.against_itself, row.at_itself, ("in one build", "in the next")
        remedy = [Remedy.of("draw-from-global-generators"), Remedy.of("seed-own-generator")]
        named = found.with_(cause="build-not-seeded", remedy=remedy)
    else:
        line = Evidence.of("rebuild-reproduces")
        one, other = (ids[0] for ids in found.groups[:2])
        place = first_difference(rows[one].records, rows[other].records)
        sides = (f"on replica {one}", f"on replica {other}")
        both = Side(rows[one].records, sides[0]), Side(rows[other].records, sides[1])
        findings = [] if place is None else findings_between(place, *both)
        named = found
    never = _never_written(found, rows)
    unwritten = [never] if never else [f for f in findings if f.kind is Kind.UNWRITTEN_MEMORY]
    if not unwritten:
        return _add(named, line, place, sides)
    explained = found.with_(cause="uninitialized-memory", remedy=[])
    return _add(explained, line, None if never else place, sides, unwritten)


def _never_written(found: Verdict, rows: Sequence[Rebuilt]) -> Finding | None:
    """Report the tensor in which the builds diverge, if its memory was never written."""
    for row in rows:
        each = row.unwritten.get(found.tensor or "")
        if each is not None:
            line = Evidence.of(
                "unwritten-tensor",
                tensor=found.tensor,
                elements=each.elements,
                total=each.total,
                allocator=each.allocator,
                allocated_at=each.source or "unknown",
            )
            return Finding(Kind.UNWRITTEN_MEMORY, [line])
    return None


def _add(
    found: Verdict,
    line: Evidence,
    place: OpDifference | None,
    whose: tuple[str, str],
    findings: Sequence[Finding] = (),
) -> Verdict:
    lines = [line, *(each for finding in findings for each in finding.lines)]
    if place is None:
        agree = [] if findings else [Evidence.of("rebuild-operators-agree")]
        return found.with_(evidence=[*found.evidence, *lines, *agree])
    sides = [
        f"{record.name} at {record.source or 'unknown'} {where}" if record else f"no further operator {where}"
        for record, where in zip((place.one, place.other), whose, strict=True)
    ]
    diverges = Evidence.of("rebuild-diverges", index=place.index, one=sides[0], other=sides[1])
    return found.with_(operator=place.record.name, phase="build", evidence=[*found.evidence, *lines, diverges])


@dataclass(frozen=True)
class _Built:
    """The observations of one repeated build."""

    records: list[OpRecord]
    state: tuple[bytes, ...]
    unwritten: dict[str, Unwritten]


def _build_once(build: Callable[[], Replica], seed: int) -> _Built:
    seed_generators(seed)
    with OpTracer(generators=True) as tracer:
        replica = build()
    model = replica.model
    named = {**named_weights(model), **named_buffers(model)}
    found = {name: tracer.memory.unwritten(tensor) for name, tensor in named.items()}
    state = weights_stage(model).digest, buffers_stage(model).digest, rng_stage().digest
    return _Built(tracer.records, state, {name: each for name, each in found.items() if each is not None})
