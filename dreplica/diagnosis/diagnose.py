"""From the place where replicas part to the verdict, through replays of the step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dreplica.agreement.stages import Stage, batch_stage, tensors_stage
from dreplica.agreement.verdict import Verdict
from dreplica.data.samples import describe
from dreplica.diagnosis.arbitrate import arbitrate
from dreplica.diagnosis.attempt import AttemptFailed, attempt
from dreplica.diagnosis.conclude import RunFacts
from dreplica.diagnosis.decide import decide
from dreplica.diagnosis.elements import compare_elements
from dreplica.diagnosis.nondeterminism import may_vary
from dreplica.diagnosis.operators import Captured, OpRecord
from dreplica.diagnosis.replay import Replayed, Replayer
from dreplica.diagnosis.struck import MOST_STRUCK_BITS
from dreplica.diagnosis.witness import Decision, Witness, could_have_made, first_difference
from dreplica.replica.rng import seed_generators
from dreplica.training.history import History, StepEntry
from dreplica.world.channel import Channel
from dreplica.world.determinism import numerics_flags
from dreplica.world.manifest import Difference, compare_values


def can_replay(found: Verdict, history: History) -> bool:
    """Whether the step at which replicas parted is one that the history can run again."""
    if found.step is None or history.snapshot is None or found.phase == "evaluation":
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
        first, second = attempt(channel, lambda: (replayer.again(indices), replayer.again(indices)))
        earlier = step < found.step
        generator = b"" if earlier else replayer.original_generator
        own = _witness(original, first, second, indices, generator, step if earlier else None)
        if found.stage == "batch":
            examined = attempt(channel, lambda: _examine_samples(dataset, indices))
            own = replace(own, loaded_by_workers=num_workers > 0, **examined)
        decision = decide(channel.gather(own), facts.overrides, _differences_now(channel, facts))
        decision = _doubt_transient(decision, first.tracer.records, found.stage, channel, facts)
        decision = _doubt_struck(decision, replayer, indices, channel)
        decision = _compare_in_full(decision, replayer, indices, channel)
        decision = _add(decision, _compare_with_replay(decision, found, replayer, channel))
        if decision.positions:
            decision = _add(decision, [f"first such sample: {describe(dataset, int(indices[decision.positions[0]]))}"])
        if step < found.step:
            decision = _add(decision, [f"already step {step} is not reproducible"])
        return _as_verdict(found, decision)
    except AttemptFailed as error:
        line = f"the step could not be run again: {error}"
        return found.with_(cause="unexplained", evidence=[*found.evidence, line])
    finally:
        replayer.close()


def _approach(step: int, replayer: Replayer, channel: Channel) -> int:
    """Brings every replica to just before `step`, or before an earlier step that some replica does not reproduce."""
    while True:
        own = attempt(channel, partial(replayer.approach, step))
        stumbled = [at for at in channel.gather(own) if at is not None]
        if not stumbled:
            return step
        step = min(stumbled)  # earlier each time, since approaching ends before its target


def _witness(
    original: Mapping[str, Stage],
    first: Replayed,
    second: Replayed,
    indices: Tensor,
    generator: bytes,
    unreproduced: int | None,
) -> Witness:
    return Witness(
        original={name: stage.digest for name, stage in original.items()},
        first={name: stage.digest for name, stage in first.stages.items()},
        second={name: stage.digest for name, stage in second.stages.items()},
        records=first.tracer.records,
        contents=first.contents,
        generator=first.generator,
        layout=first.layout,
        original_generator=generator,
        generator_struck=first.tracer.generator_struck,
        indices_intact=first.stages["indices"].digest == tensors_stage({"indices": indices}).digest,
        against_itself=first_difference(first.tracer.records, second.tracer.records),
        sample_digests=[],
        unreproduced=unreproduced,
    )


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
    return replace(decision, cause="unexplained", evidence=[*decision.evidence, line])


def _doubt_struck(decision: Decision, replayer: Replayer, indices: Tensor, channel: Channel) -> Decision:
    """Looks in full at memory that seems to have changed by itself: a fault flips few bits.

    Where many differ, something has written there that is no operator of torch's: NumPy, or a C extension. Where the
    sound side is one number throughout, that it seemed accounted for may be chance: zeros are alike everywhere.
    """
    struck = decision.struck
    if struck is None:
        return decision

    def look() -> list[Tensor]:
        if channel.rank not in (struck.replica_id, struck.sound_id):
            return []
        again = replayer.again(indices, struck.index)
        if struck.index is not None:
            return again.tracer.captured.inputs if again.tracer.captured else []
        assert struck.stage is not None
        assert struck.tensor is not None
        tensor = replayer.replayed(struck.stage, struck.tensor)
        return [] if tensor is None else [tensor]

    rows = channel.gather(attempt(channel, look))
    pairs = list(zip(rows[struck.sound_id], rows[struck.replica_id], strict=False))
    differing = [(sound, difference) for sound, other in pairs if (difference := compare_elements(sound, other))]
    lines = [str(difference) for _, difference in differing]
    doubts = [
        f"{difference.differing_bits} bits differ: more than flip by themselves, so something that is not an operator "
        "of torch's has written there"
        for _, difference in differing
        if difference.differing_bits > MOST_STRUCK_BITS
    ]
    if struck.index is not None and any(bool((sound == sound.flatten()[0]).all()) for sound, _ in differing):
        doubts.append("on the other side all elements are the same number, which may have come from anywhere")
    decision = _add(decision, [*lines, *doubts])
    return replace(decision, cause="unexplained") if doubts or not differing else decision


def _compare_in_full(decision: Decision, replayer: Replayer, indices: Tensor, channel: Channel) -> Decision:
    """Runs the operator in question once more where it matters, and compares the two results element by element."""
    place = decision.operator
    if place is None or not place.made_here:
        return decision
    replica_id = decision.replica_against_itself
    if replica_id is not None:

        def describe() -> str:
            if channel.rank != replica_id:
                return ""
            one, other = (replayer.again(indices, place.index).tracer.captured for _ in range(2))
            return _describe_outputs(one.outputs, other.outputs) if one and other else ""

        text = channel.gather(attempt(channel, describe))[replica_id]
        return _add(decision, [text] if text else [])
    if decision.sides is None:
        return decision
    takes_part = channel.rank in decision.sides
    captured = attempt(channel, lambda: replayer.again(indices, place.index).tracer.captured if takes_part else None)
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
        (whole_class,) = (ids for ids in decision.classes or [wrong] if wrong[0] in ids)
        return replace(decision, suspects=whole_class)
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
