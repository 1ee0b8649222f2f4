"""Diagnosis of a divergence in a training run, by replaying the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dreplica.agreement.verdict.advice import advise
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.data.samples import describe
from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.decision.nondeterministic_ops import is_picked_by_timing, may_vary
from dreplica.diagnosis.decision.rules import HARDWARE, may_be_hardware, name_in
from dreplica.diagnosis.evidence.data_source import compare_held, describe_held
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import (
    Decision,
    Witness,
    could_have_made,
    difference_behind,
    first_difference,
    with_findings,
    with_lines,
)
from dreplica.diagnosis.evidence.place import findings_of_replays
from dreplica.diagnosis.evidence.tensor_diff import Difference as Changed
from dreplica.diagnosis.measurement.error_propagation import measure_path
from dreplica.diagnosis.measurement.full_tensors import compare, compare_memory, compare_outputs
from dreplica.diagnosis.measurement.original_step import examine_original
from dreplica.diagnosis.replay.replay_run import Repeats, Replayed, Replayer
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel
from dreplica.environment.determinism import numerics_flags
from dreplica.environment.manifest import Difference, compare_values
from dreplica.state.rng import seed_generators
from dreplica.state.stages import Stage, batch_stage, tensors_stage
from dreplica.training.history import History, StepEntry


def can_replay(found: Verdict, history: History) -> bool:
    """Return True if the history can replay the step at which replicas diverged."""
    if found.step is None or history.snapshot is None or found.phase == "evaluation":
        return False
    return any(isinstance(entry, StepEntry) and entry.step == found.step for entry in history.entries)


Judge = Callable[[Sequence[Witness], Callable[[], Mapping[str, bytes]]], Decision]
"""Names the cause from the replicas' observations. Its second argument replays the step and returns stage digests."""


def diagnose(
    found: Verdict,
    original: Mapping[str, Stage],
    replayer: Replayer,
    dataset: Dataset[Any],
    num_workers: int,
    channel: Channel,
    facts: RunFacts,
    judge: Judge | None = None,
) -> Verdict:
    """Diagnose a divergence at a training step by replaying it.

    Note:
        Collective: call on every rank. The replica's state is restored.

    Args:
        found: The verdict of the comparison.
        original: This replica's stages of the original step, as compared.
        replayer: Replays steps of the history that holds the step.
        dataset: The training set, to distinguish different data from data that was changed after loading.
        num_workers: Number of worker processes that loaded this replica's batches.
        channel: The control process group.
        facts: The known facts of the run.
        judge: Replaces `decide` for a divergence that is not between replicas. Collective.

    Returns:
        The verdict with cause, suspects, evidence and location. `unexplained` if the step cannot be replayed.
    """
    assert found.step is not None
    try:
        step, reproduced = _approach(found.step, replayer, channel)
        indices = replayer.indices()
        first, second = attempt(channel, lambda: (replayer.again(indices), replayer.again(indices)))
        earlier = step < found.step
        own = _witness(original, first, second, indices, None if earlier else found.stage)
        own = replace(own, unreproduced=None if reproduced else step)
        if not earlier:
            parts = replayer, indices, original, first.tracer.records, found.stage, channel.rank
            findings = attempt(channel, lambda: examine_original(*parts))
            own = replace(own, findings=[*own.findings, *findings])
        if found.stage == "batch":
            examined = attempt(channel, lambda: _examine_samples(dataset, indices))
            own = replace(own, loaded_by_workers=num_workers > 0, **examined)
        differences = _differences_now(channel, facts)
        witnesses = channel.gather(own)
        if judge is None:
            decision = decide(witnesses, facts.overrides, differences)
        else:
            decision = judge(witnesses, lambda: _digests(attempt(channel, lambda: replayer.again(indices))))
        decision = find_settings(decision, found)
        decision = _find_races(decision, first.tracer.records, found.stage, channel, facts)
        decision = compare_memory(decision, replayer, indices, channel)
        decision = compare_outputs(decision, replayer, indices, channel, arbitrates=may_be_hardware(decision))
        decision = name_in(find_variation(decision, facts))
        if decision.positions:
            index = int(indices[decision.positions[0]])
            line = Evidence.of("first-differing-sample", sample=describe(dataset, index), index=index)
            decision = with_lines(decision, line)
        if decision.cause == "batch-differs":
            held = channel.gather(attempt(channel, lambda: describe_held(dataset)))
            decision = with_lines(decision, *compare_held(held, len(decision.positions), len(indices)))
        if earlier:
            decision = with_lines(decision, Evidence.of("earlier-step-not-reproducible", step=step))
        if decision.cause == "unexplained":
            changed = [row for row in differences if row not in facts.differences and not row.may_round]
            decision = with_lines(decision, *(field_evidence("later-difference", row) for row in changed))
        runs = [witness.records for witness in witnesses], second.tracer.records
        verdict = as_verdict(found, decision).with_(path=measure_path(decision, *runs, replayer, indices, channel))
    except AttemptFailed as error:
        line = Evidence.of("replay-failed", error=error)
        verdict = found.with_(cause="unexplained", evidence=[*found.evidence, line])
    return close_replayer(verdict, replayer, channel)


def close_replayer(verdict: Verdict, replayer: Repeats, channel: Channel) -> Verdict:
    """Restore the replicas' state and return the verdict, which mentions a failure to do so.

    Note:
        Collective: call on every rank.

    Args:
        verdict: The verdict to return.
        replayer: The replayer to close, which restores the state from before the diagnosis.
        channel: The control process group.
    """
    try:
        attempt(channel, replayer.close)
    except AttemptFailed as error:
        return verdict.with_(evidence=[*verdict.evidence, Evidence.of("restore-failed", error=error)])
    return verdict


def _approach(step: int, replayer: Replayer, channel: Channel) -> tuple[int, bool]:
    """Replay on every replica up to just before `step`, or before an earlier step that some replica does not reproduce.

    Returns:
        The step, and False if this replica is known not to reproduce it.
    """
    reproduced = True
    while True:
        own = attempt(channel, partial(replayer.approach, step))
        stumbled = [at for at in channel.gather(own) if at is not None]
        if not stumbled:
            return step, reproduced
        step = min(stumbled)  # Earlier each time, since the approach ends before its target.
        reproduced = own != step


def _witness(
    original: Mapping[str, Stage],
    first: Replayed,
    second: Replayed,
    indices: Tensor,
    stage: str | None,
) -> Witness:
    records = first.tracer.records, second.tracer.records
    changed = compare(indices, first.indices)
    itself = difference_behind(*records, stage) or first_difference(*records)
    return Witness(
        original={name: stage.digest for name, stage in original.items()},
        first=_digests(first),
        second=_digests(second),
        records=first.tracer.records,
        contents=first.contents,
        generator=first.generator,
        layout=first.layout,
        generator_changed=first.tracer.generator_changed,
        indices_intact=first.stages["indices"].digest == tensors_stage({"indices": indices}).digest,
        indices_bits=changed.differing_bits if isinstance(changed, Changed) else 0,
        against_itself=itself,
        foreign=first.foreign,
        at_itself=findings_of_replays(itself, *records, first.contents.before),
        sample_digests=[],
    )


def _digests(replayed: Replayed) -> dict[str, bytes]:
    return {name: stage.digest for name, stage in replayed.stages.items()}


def _differences_now(channel: Channel, facts: RunFacts) -> list[Difference]:
    """Return the manifest fields that differ, with current flags: the training code may have changed them."""
    flags = compare_values([{"numerics": row} for row in channel.gather(numerics_flags())])
    return [*(row for row in facts.differences if not row.field.startswith("numerics.")), *flags]


def _find_races(
    decision: Decision, records: Sequence[OpRecord], stage: str | None, channel: Channel, facts: RunFacts
) -> Decision:
    """Find nondeterministic operators that may have made a one-time difference: it may have been a rare race."""
    if Kind.ORIGINAL_DIFFERS not in decision.kinds or not facts.manifests:
        return decision
    manifest = facts.manifests[channel.rank]
    own = {
        record.name
        for record in records
        if could_have_made(record, stage) and may_vary(record.name, manifest["device"]["type"], manifest["numerics"])
    }
    names = sorted(set().union(*channel.gather(own)))
    line = Evidence.of("operator-may-race", operators=names)
    return with_findings(decision, Finding(Kind.MAY_RACE, [line])) if names else decision


def find_variation(decision: Decision, facts: RunFacts) -> Decision:
    """Find out if the operator at the place may vary although no replica's replays differ.

    A few additions in a varying order often give the same result twice, and cuDNN keeps the algorithm that it picked in
    each process.
    """
    place = decision.operator
    if not decision.kinds & {Kind.PROVED_WRONG, Kind.BOTH_POSSIBLE} or decision.settled:
        return decision
    if place is None or not place.made_here or decision.sides is None or not facts.manifests:
        return decision
    name, manifests = place.record.name, [facts.manifests[side] for side in decision.sides]
    if not any(may_vary(name, manifest["device"]["type"], manifest["numerics"]) for manifest in manifests):
        return decision
    timed = any(is_picked_by_timing(name, manifest["numerics"]) for manifest in manifests)
    if Kind.BOTH_POSSIBLE in decision.kinds and timed:
        finding = Finding(Kind.PICKED_BY_TIMING, [Evidence.of("operator-picked-by-timing")])
        return with_findings(decision, finding, suspects=sorted(decision.sides))
    return with_findings(decision, Finding(Kind.MAY_RACE, [Evidence.of("operator-may-vary", operator=name)]))


def _examine_samples(dataset: Dataset[Any], indices: Tensor) -> dict[str, Any]:
    digests = digest_samples(dataset, indices)
    return {"sample_digests": digests, "samples_are_random": digests != digest_samples(dataset, indices, seed=1)}


def digest_samples(dataset: Dataset[Any], indices: Tensor, seed: int = 0) -> list[bytes]:
    """Compute the digest of each sample, loaded alone, after seeding the global generators.

    Args:
        dataset: The dataset to load from.
        indices: The samples' indices, shape (batch,).
        seed: The seed of the global generators.

    Returns:
        16 bytes per sample.
    """
    seed_generators(seed)
    return [batch_stage(default_collate([dataset[int(index)]])).digest for index in indices]


def as_verdict(found: Verdict, decision: Decision) -> Verdict:
    """Return the verdict of the comparison with the cause and location of a decision."""
    place = decision.operator
    record = None if place is None else place.record
    # What the comparison alone has found (entries that only some replicas have) does not depend on the replays.
    cause = found.cause if decision.cause == "unexplained" else decision.cause
    verdict = found.with_(
        cause=cause,
        suspects=decision.suspects,
        groups=decision.groups or found.groups,
        module=record.module if record else found.module,
        operator=record.name if record else None,
        phase=record.phase if record else None,
        evidence=[*found.evidence, *decision.evidence],
    )
    if cause in HARDWARE:  # whose first remedy says what was excluded
        return verdict.with_(remedy=[])
    remedy = found.remedy or advise(verdict) or (_remedy(decision) if cause == "unexplained" else [])
    return verdict.with_(remedy=remedy)


def find_settings(decision: Decision, found: Verdict) -> Decision:
    """Add a finding if the comparison has shown that settings, or nothing but generators, differ."""
    kinds = {"hyperparameter-differs": Kind.HYPERPARAMETER_DIVIDES, "generators-differ": Kind.GENERATORS_DIVIDE}
    return with_findings(decision, Finding(kinds[found.cause])) if found.cause in kinds else decision


def field_evidence(code: str, difference: Difference) -> Evidence:
    """Return evidence of a code about one manifest field that differs."""
    return Evidence.of(code, difference=str(difference), field=difference.field, values=list(difference.values))


def _remedy(decision: Decision) -> list[Remedy]:
    """Return remedies for a known place with an unknown cause: those of `unexplained` would be misleading."""
    place = decision.operator
    if place is None or not place.same_structure or place.made_here:
        return []
    record = place.record
    source = f" at {record.source}" if record.source else ""
    return [Remedy.of("make-input-equal", operator=record, source=source)]
