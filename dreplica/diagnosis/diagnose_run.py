"""From the place where replicas part to the verdict, through replays of the step."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.data.samples import describe
from dreplica.diagnosis.decision.conclude import RunFacts
from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.decision.nondeterministic_ops import is_picked_by_timing, may_vary
from dreplica.diagnosis.evidence.observation import (
    Decision,
    Witness,
    could_have_made,
    difference_behind,
    first_difference,
)
from dreplica.diagnosis.measurement.error_propagation import measure_path
from dreplica.diagnosis.measurement.full_tensors import add, compare_outputs, doubt_moved, doubt_struck
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
    """Whether the step at which replicas parted is one that the history can run again."""
    if found.step is None or history.snapshot is None or found.phase == "evaluation":
        return False
    return any(isinstance(entry, StepEntry) and entry.step == found.step for entry in history.entries)


_SETTING = re.compile(r"(.+\.)?group\d+\.\w+")
"""The name of an entry of the optimizer stage that is no tensor's state."""

Judge = Callable[[Sequence[Witness], Callable[[], Mapping[str, bytes]]], Decision]
"""Decides on what every replica has to say; its second argument takes the step once more, for its stages' digests."""


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
    """The verdict on a divergence at a training step. A collective; the replica is left as it was found.

    Args:
        found: what the comparison says.
        original: this replica's stages at that step, as compared.
        replayer: over the history that holds the step.
        dataset: the training set, to tell different data from data that was changed afterwards.
        num_workers: that loaded this replica's batches.
        channel: between all replicas.
        facts: what else is known of the run.
        judge: in place of `decide`, for a divergence that is not between replicas. A collective.
    """
    assert found.step is not None
    try:
        step, reproduced = _approach(found.step, replayer, channel)
        indices = replayer.indices()
        first, second = attempt(channel, lambda: (replayer.again(indices), replayer.again(indices)))
        earlier = step < found.step
        generator = b"" if earlier else replayer.original_generator
        own = _witness(original, first, second, indices, generator, None if earlier else found.stage)
        own = replace(own, unreproduced=None if reproduced else step)
        if found.stage == "batch":
            examined = attempt(channel, lambda: _examine_samples(dataset, indices))
            own = replace(own, loaded_by_workers=num_workers > 0, **examined)
        differences = _differences_now(channel, facts)
        witnesses = channel.gather(own)
        if judge is None:
            decision = decide(witnesses, facts.overrides, differences)
        else:
            decision = judge(witnesses, lambda: _digests(attempt(channel, lambda: replayer.again(indices))))
        decision = _doubt_transient(decision, first.tracer.records, found.stage, channel, facts)
        decision = doubt_struck(decision, replayer, indices, channel)
        decision = doubt_persistent(compare_outputs(decision, replayer, indices, channel), facts)
        decision = doubt_moved(decision, found, original, first.stages, replayer, channel)
        if decision.positions:
            decision = add(decision, [f"first such sample: {describe(dataset, int(indices[decision.positions[0]]))}"])
        if earlier:
            decision = add(decision, [f"already step {step} is not reproducible"])
        if decision.cause == "unexplained":
            changed = [str(row) for row in differences if row not in facts.differences and not row.may_round]
            decision = add(decision, [f"differs, as it stands now: {row}" for row in changed])
        runs = [witness.records for witness in witnesses], second.tracer.records
        verdict = as_verdict(found, decision).with_(path=measure_path(decision, *runs, replayer, indices, channel))
    except AttemptFailed as error:
        line = f"the step could not be run again: {error}"
        verdict = found.with_(cause="unexplained", evidence=[*found.evidence, line])
    return put_back(verdict, replayer, channel)


def put_back(verdict: Verdict, replayer: Repeats, channel: Channel) -> Verdict:
    """Closes the replayer; the verdict, which says so where that has failed. A collective."""
    try:
        attempt(channel, replayer.close)
    except AttemptFailed as error:
        line = f"the state in which the replicas were found could not be put back: {error}"
        return verdict.with_(evidence=[*verdict.evidence, line])
    return verdict


def _approach(step: int, replayer: Replayer, channel: Channel) -> tuple[int, bool]:
    """Brings every replica to just before `step`, or before an earlier step that some replica does not reproduce.

    Returns the step, and whether this replica reproduces it, as far as it is known.
    """
    reproduced = True
    while True:
        own = attempt(channel, partial(replayer.approach, step))
        stumbled = [at for at in channel.gather(own) if at is not None]
        if not stumbled:
            return step, reproduced
        step = min(stumbled)  # earlier each time, since approaching ends before its target
        reproduced = own != step


def _witness(
    original: Mapping[str, Stage],
    first: Replayed,
    second: Replayed,
    indices: Tensor,
    generator: bytes,
    stage: str | None,
) -> Witness:
    records = first.tracer.records, second.tracer.records
    return Witness(
        original={name: stage.digest for name, stage in original.items()},
        first=_digests(first),
        second=_digests(second),
        records=first.tracer.records,
        contents=first.contents,
        generator=first.generator,
        layout=first.layout,
        original_generator=generator,
        generator_struck=first.tracer.generator_struck,
        indices_intact=first.stages["indices"].digest == tensors_stage({"indices": indices}).digest,
        against_itself=difference_behind(*records, stage) or first_difference(*records),
        sample_digests=[],
    )


def _digests(replayed: Replayed) -> dict[str, bytes]:
    return {name: stage.digest for name, stage in replayed.stages.items()}


def _differences_now(channel: Channel, facts: RunFacts) -> list[Difference]:
    """Manifest fields that differ, the flags as they stand now: code that trains may have changed them."""
    flags = compare_values([{"numerics": row} for row in channel.gather(numerics_flags())])
    return [*(row for row in facts.differences if not row.field.startswith("numerics.")), *flags]


def _doubt_transient(
    decision: Decision, records: Sequence[OpRecord], stage: str | None, channel: Channel, facts: RunFacts
) -> Decision:
    """A difference that does not come back may be a rare race, where an operator that is not deterministic ran."""
    if decision.cause != "transient-fault" or not facts.manifests:
        return decision
    manifest = facts.manifests[channel.rank]
    own = {
        record.name
        for record in records
        if could_have_made(record, stage) and may_vary(record.name, manifest["device"]["type"], manifest["numerics"])
    }
    names = sorted(set().union(*channel.gather(own)))
    if not names:
        return decision
    line = f"{', '.join(names)} ran in this step and is not deterministic with these settings: it may have been a race"
    return add(decision, [line], cause="unexplained")


def doubt_persistent(decision: Decision, facts: RunFacts) -> Decision:
    """What replicas came to twice each, and not all alike, no hardware need have made where the operator may vary: a
    few additions in disorder often come out the same, and cuDNN keeps to what it has picked in each process."""
    place = decision.operator
    if not (decision.cause == "persistent-fault" or decision.both_possible) or decision.settled:
        return decision
    if place is None or not place.made_here or decision.sides is None or not facts.manifests:
        return decision
    name, manifests = place.record.name, [facts.manifests[side] for side in decision.sides]
    if not any(may_vary(name, manifest["device"]["type"], manifest["numerics"]) for manifest in manifests):
        return decision
    if decision.both_possible and any(is_picked_by_timing(name, manifest["numerics"]) for manifest in manifests):
        line = "each process keeps to the algorithm that it found the fastest, and replicas have found different ones"
        return add(decision, [line], cause="nondeterministic-operator", suspects=sorted(decision.sides))
    line = f"{name} is not deterministic with these settings: it may have been that, though no replica's replays differ"
    return add(decision, [line], cause="unexplained")


def _examine_samples(dataset: Dataset[Any], indices: Tensor) -> dict[str, Any]:
    digests = digest_samples(dataset, indices)
    return {"sample_digests": digests, "samples_are_random": digests != digest_samples(dataset, indices, seed=1)}


def digest_samples(dataset: Dataset[Any], indices: Tensor, seed: int = 0) -> list[bytes]:
    """16 bytes for each sample, loaded by itself, the global generators seeded first."""
    seed_generators(seed)
    return [batch_stage(default_collate([dataset[int(index)]])).digest for index in indices]


def as_verdict(found: Verdict, decision: Decision) -> Verdict:
    """What the comparison has found, with the cause and place that were decided on."""
    place = decision.operator
    record = None if place is None else place.record
    # What the comparison saw by itself (entries that only some replicas have) does not depend on the replays.
    cause = found.cause if decision.cause == "unexplained" else decision.cause
    return found.with_(
        cause=cause,
        suspects=decision.suspects,
        classes=decision.classes or found.classes,
        module=record.module if record else found.module,
        operator=record.name if record else None,
        phase=record.phase if record else None,
        evidence=[*found.evidence, *decision.evidence],
        remedy=(_remedy(found, decision) if cause == "unexplained" else []) or found.remedy,
    )


def _remedy(found: Verdict, decision: Decision) -> list[str]:
    """Where it is known what differs, and not why: what is said of `unexplained` in general would lead away from it."""
    place = decision.operator
    if found.stage == "optimizer" and _SETTING.fullmatch(found.tensor or ""):
        who = "look for code, a file or an environment variable that sets it"
        return [f"give the optimizer the same {found.tensor} on all replicas: {who}"]
    if place is None or not place.same_structure or place.made_here:
        return []
    record = place.record
    where = f" at {record.source}" if record.source else ""
    return [f"find out what {record}{where} is given, and make it the same on all replicas, each time"]
