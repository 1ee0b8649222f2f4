"""From the place where replicas part to the verdict, through replays of the step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dreplica.agreement.stages import Stage, batch_stage, tensors_stage
from dreplica.agreement.verdict import Verdict
from dreplica.diagnosis.arbitrate import arbitrate
from dreplica.diagnosis.conclude import RunFacts
from dreplica.diagnosis.decide import decide
from dreplica.diagnosis.elements import compare_elements
from dreplica.diagnosis.nondeterminism import may_vary
from dreplica.diagnosis.operators import Captured, OpRecord
from dreplica.diagnosis.replay import Replayed, Replayer
from dreplica.diagnosis.witness import Decision, Witness, first_difference
from dreplica.replica.rng import seed_generators
from dreplica.training.history import History, StepEntry
from dreplica.world.channel import Channel


def can_replay(found: Verdict, history: History) -> bool:
    """Whether the step at which replicas parted is one that the history can run again."""
    if found.step is None or history.snapshot is None or found.stage == "predictions":
        return False
    return any(isinstance(entry, StepEntry) and entry.step == found.step for entry in history.entries)


def diagnose(
    found: Verdict,
    original: Mapping[str, Stage],
    replayer: Replayer,
    dataset: Dataset[Any],
    num_workers: int,
    channel: Channel,
    facts: RunFacts,
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
    """
    assert found.step is not None
    try:
        step = _approach(found.step, replayer, channel)
        indices = replayer.indices()
        first, second = replayer.again(indices), replayer.again(indices)
        own = _witness(original, first, second, indices, step if step < found.step else None)
        if found.stage == "batch":
            own = replace(own, loaded_by_workers=num_workers > 0, **_examine_samples(dataset, indices))
        decision = decide(channel.gather(own), facts.overrides, facts.differences)
        decision = _doubt_transient(decision, first.tracer.records, channel, facts)
        decision = _compare_in_full(decision, replayer, indices, channel)
        decision = _add(decision, _compare_with_replay(decision, found, replayer, channel))
        if decision.positions:
            decision = _add(decision, [f"first such sample: index {int(indices[decision.positions[0]])}"])
        if step < found.step:
            decision = _add(decision, [f"already step {step} is not reproducible"])
        return _as_verdict(found, decision)
    finally:
        replayer.close()


def _approach(step: int, replayer: Replayer, channel: Channel) -> int:
    """Brings every replica to just before `step`, or before an earlier step that some replica does not reproduce."""
    stumbled = [at for at in channel.gather(replayer.approach(step)) if at is not None]
    if not stumbled:
        return step
    earlier = min(stumbled)
    replayer.approach(earlier)
    return earlier


def _witness(
    original: Mapping[str, Stage],
    first: Replayed,
    second: Replayed,
    indices: Tensor,
    unreproduced: int | None,
) -> Witness:
    return Witness(
        original={name: stage.digest for name, stage in original.items()},
        first={name: stage.digest for name, stage in first.stages.items()},
        second={name: stage.digest for name, stage in second.stages.items()},
        records=first.tracer.records,
        contents=first.contents,
        generator=first.generator,
        generator_struck=first.tracer.generator_struck,
        indices_intact=first.stages["indices"].digest == tensors_stage({"indices": indices}).digest,
        against_itself=first_difference(first.tracer.records, second.tracer.records),
        sample_digests=[],
        unreproduced=unreproduced,
    )


def _doubt_transient(decision: Decision, records: Sequence[OpRecord], channel: Channel, facts: RunFacts) -> Decision:
    """A difference that does not come back may be a rare race, where an operator that is not deterministic ran."""
    if decision.cause != "transient-fault" or not facts.manifests:
        return decision
    manifest = facts.manifests[channel.rank]
    own = {record.name for record in records if may_vary(record.name, manifest["device"]["type"], manifest["numerics"])}
    names = sorted(set().union(*channel.gather(own)))
    if not names:
        return decision
    line = f"{', '.join(names)} ran in this step and is not deterministic with these settings: it may have been a race"
    return replace(decision, cause="unexplained", evidence=[*decision.evidence, line])


def _compare_in_full(decision: Decision, replayer: Replayer, indices: Tensor, channel: Channel) -> Decision:
    """Runs the operator in question once more where it matters, and compares the two results element by element."""
    place = decision.operator
    if place is None or not place.made_here:
        return decision
    replica_id = decision.replica_against_itself
    if replica_id is not None:
        text = ""
        if channel.rank == replica_id:
            one, other = (replayer.again(indices, place.index).tracer.captured for _ in range(2))
            text = _describe_outputs(one.outputs, other.outputs) if one and other else ""
        text = channel.gather(text)[replica_id]
        return _add(decision, [text] if text else [])
    if decision.sides is None:
        return decision
    captured = replayer.again(indices, place.index).tracer.captured if channel.rank in decision.sides else None
    outputs = channel.gather(captured.outputs if captured else None)
    decision = _add(decision, [_describe_outputs(*(outputs[side] for side in decision.sides))])
    if decision.cause == "persistent-fault" and not decision.suspects:
        return _settle(decision, captured, outputs, channel)
    return decision


def _settle(decision: Decision, captured: Captured | None, outputs: Sequence[Any], channel: Channel) -> Decision:
    """Two replicas, no vote: the operator run in float64 tells which side is outside rounding error, if one is."""
    assert decision.sides is not None
    result = None
    if captured is not None:
        result = arbitrate(captured, [outputs[side] for side in decision.sides], decision.sides)
    judged = next((row for row in channel.gather(result) if row is not None), None)
    if judged is None:
        return _add(decision, ["there is no bound for this operator's rounding error, to tell which side is wrong"])
    sides = decision.sides
    decision = _add(decision, judged.evidence)
    wrong = [side for side, possible in zip(sides, judged.possible, strict=True) if not possible]
    if len(wrong) == 1:
        return replace(decision, suspects=wrong)
    if wrong:
        return decision
    line = "both are legitimate ways of rounding, though settings and environment are the same"
    return replace(_add(decision, [line]), cause="unexplained")


def _add(decision: Decision, lines: list[str]) -> Decision:
    return replace(decision, evidence=[*decision.evidence, *lines])


def _describe_outputs(one: Sequence[Tensor], other: Sequence[Tensor]) -> str:
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {number}: {a.dtype} {tuple(a.shape)} on one side, {b.dtype} {tuple(b.shape)} on the other"
        difference = compare_elements(a, b)
        if difference is not None:
            return f"output {number}: {difference}"
    return "run once more, the operator gave the same on both sides"


def _compare_with_replay(decision: Decision, found: Verdict, replayer: Replayer, channel: Channel) -> list[str]:
    """Of a transient fault whose traces are still there: what happened against the replay, element by element."""
    if decision.cause != "transient-fault" or found.stage is None or found.tensor is None:
        return []
    text = ""
    if channel.rank in decision.suspects:
        pair = replayer.present_and_replayed(found.stage, found.tensor)
        text = f"{found.tensor} of {found.stage}: {compare_elements(*pair)}" if pair else ""
    return [f"replica {rank}: {row}" for rank, row in enumerate(channel.gather(text)) if row]


def _examine_samples(dataset: Dataset[Any], indices: Tensor) -> dict[str, Any]:
    digests = digest_samples(dataset, indices)
    return {"sample_digests": digests, "samples_are_random": digests != digest_samples(dataset, indices, seed=1)}


def digest_samples(dataset: Dataset[Any], indices: Tensor, seed: int = 0) -> list[bytes]:
    """16 bytes for each sample, loaded by itself, the global generators seeded first."""
    seed_generators(seed)
    return [batch_stage(default_collate([dataset[int(index)]])).digest for index in indices]


def _as_verdict(found: Verdict, decision: Decision) -> Verdict:
    place = decision.operator
    record = None if place is None else place.record
    return found.with_(
        cause=decision.cause,
        suspects=decision.suspects,
        classes=decision.classes or found.classes,
        module=record.module if record else found.module,
        operator=record.name if record else None,
        phase=record.phase if record else None,
        evidence=[*found.evidence, *decision.evidence],
    )
