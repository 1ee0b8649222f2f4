"""From a divergence to its verdict, on one replica; whole jobs are in test_lookalikes and end_to_end."""

import random
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.data.loading.loader import Batch
from dreplica.data.samples import TensorImages
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.decision.rules import name_in
from dreplica.diagnosis.diagnose_run import _approach, can_replay, diagnose, digest_samples, find_variation
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, OpDifference
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.stages import Stage
from dreplica.training.history import History, StepEntry
from tests.diagnosis.replay.test_replay_run import (
    NUM_STEPS,
    Trained,
    everything,
    load,
    train,
    with_adamw,
    with_momentum,
)
from tests.harness import run_replicas
from tests.messages import codes, data_of, text_of, texts

IMAGES = TensorImages(torch.arange(80.0).view(10, 2, 2, 2), torch.arange(10) % 5)
INDICES = torch.tensor([3, 1, 7])


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def finding(step: int | None = 3, stage: str = "weights") -> Verdict:
    return Verdict(False, "unexplained", "diverged", step=step, stage=stage, tensor="body.5.weight", groups=[[0]])


# ---- what can be replayed


def test_only_steps_since_the_snapshot_can_be_replayed() -> None:
    history = train(with_momentum, every=2).history
    assert history.snapshot is not None
    taken = history.snapshot.steps_done
    assert 0 < taken < NUM_STEPS
    can = [step for step in range(-1, NUM_STEPS + 3) if can_replay(finding(step), history)]
    assert can == list(range(taken + 1, NUM_STEPS + 1))
    assert not can_replay(finding(None), history)
    assert not can_replay(finding(NUM_STEPS, "predictions").with_(phase="evaluation"), history)


def test_without_snapshots_nothing_can_be_replayed() -> None:
    trained = train(with_momentum, every=0)
    assert not can_replay(finding(), trained.history)
    assert not can_replay(finding(), History(trained.replica, 50))


# ---- samples without a model


class Augmented(TensorImages):
    def __init__(self, kind: str) -> None:
        super().__init__(IMAGES.images, IMAGES.labels)
        self.kind = kind

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = {
            "python": random.random,
            "numpy": numpy.random.rand,
            "torch": lambda: float(torch.rand(1)),
            "entropy": random.SystemRandom().random,
        }[self.kind]()
        image, label = super().__getitem__(index)
        return image + noise, label


def test_each_sample_has_a_digest_of_its_own() -> None:
    digests = digest_samples(IMAGES, INDICES)
    assert len(set(digests)) == 3
    assert digest_samples(IMAGES, INDICES.flip(0)) == digests[::-1]
    other = TensorImages(IMAGES.images.clone(), IMAGES.labels.clone())
    other.images[1, 0, 0, 0] = -0.0
    other.images[1, 0, 0, 0] += 1e-3
    assert [a == b for a, b in zip(digests, digest_samples(other, INDICES), strict=True)] == [True, False, True]
    relabelled = TensorImages(IMAGES.images, IMAGES.labels + 1)
    assert not set(digests) & set(digest_samples(relabelled, INDICES))


@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_random_samples_follow_the_seed_and_nothing_else(kind: str) -> None:
    dataset = Augmented(kind)
    seed_generators(1)
    one = digest_samples(dataset, INDICES)
    seed_generators(2)
    assert digest_samples(dataset, INDICES) == one
    assert not set(digest_samples(dataset, INDICES, seed=1)) & set(one)


def test_samples_by_chance_follow_no_seed() -> None:
    dataset = Augmented("entropy")
    assert not set(digest_samples(dataset, INDICES)) & set(digest_samples(dataset, INDICES))


# ---- diagnosis


def diagnosed(trained: Trained, step: int, original: dict[str, Stage], load: Any = load, **found: Any) -> Verdict:
    replayer = trained.replayer(load)
    return diagnose(finding(step, **found), original, replayer, IMAGES, 0, Channel(), RunFacts(1))


def without(
    stages: dict[str, Stage], stage: str, num_tensors: int = 1, first: str = "body.5.weight"
) -> dict[str, Stage]:
    """Return the stages as if `num_tensors` tensors of `stage` had differed, from `first` on."""
    names = stages[stage].names
    start = names.index(first) if first in names else 0
    changed = {names[(start + number) % len(names)] for number in range(num_tensors)}
    digests = {name: bytes(16) if name in changed else digest for name, digest in stages[stage].entries().items()}
    return {**stages, stage: Stage(names, b"".join(digests.values()))}


def flipped(trained: Trained) -> dict[str, Stage]:
    """Flip the sign of a weight after the last step, and return the stages as they were compared."""
    with torch.no_grad():
        trained.replica.model.body[5].weight[0, 2] *= -1.0
    return without(trained.stages[NUM_STEPS], "weights")


def test_unreproduced_flip_is_transient_and_state_is_restored() -> None:
    trained = train(with_adamw)
    stages = flipped(trained)
    before = everything(trained.replica)
    verdict = diagnosed(trained, NUM_STEPS, stages)
    assert (verdict.cause, verdict.suspects, verdict.step) == ("transient-fault", [0], NUM_STEPS)
    assert everything(trained.replica) == before


@pytest.mark.parametrize("step", [1, 3])
def test_difference_in_a_tensor_that_is_gone_is_unexplained(step: int) -> None:
    """Without the tensor itself, it is not known how many of its bits differed."""
    trained = train(with_adamw)
    verdict = diagnosed(trained, step, without(trained.stages[step], "weights"))
    assert (verdict.cause, verdict.suspects, verdict.step) == ("unexplained", [0], step)
    assert "original-tensor-gone" in codes(verdict.evidence)


def test_many_changed_tensors_are_not_a_bit_flip() -> None:
    """Code scales all weights once. All gradients had agreed, so one fault would be in one tensor."""
    trained = train(with_adamw)
    flipped(trained)
    for num_tensors, cause in ((1, "transient-fault"), (2, "unexplained"), (3, "unreplayed-state")):
        verdict = diagnosed(trained, NUM_STEPS, without(trained.stages[NUM_STEPS], "weights", num_tensors))
        assert (verdict.cause, verdict.suspects) == (cause, [0])
    assert data_of(verdict.evidence, "original-elements-differ")["count"] == 3
    verdict = diagnosed(trained, 3, without(trained.stages[3], "gradients", 3), stage="gradients")
    assert verdict.cause == "unexplained", "there, one fault of an activation reaches many"


def test_a_whole_tensor_written_once_is_no_flip_of_bits() -> None:
    trained = train(with_momentum)
    with torch.no_grad():
        trained.replica.model.body[5].weight *= 0.9
    verdict = diagnosed(trained, NUM_STEPS, without(trained.stages[NUM_STEPS], "weights"))
    assert (verdict.cause, verdict.suspects) == ("unreplayed-state", [0])
    assert data_of(verdict.evidence, "original-elements-differ")["elements"] == 2560


def test_tensor_of_another_shape_is_not_a_bit_flip() -> None:
    """A tensor of another shape is no bit flip, and raises no exception."""
    trained = train(with_momentum)
    norm = trained.replica.model.body[1]
    norm.running_mean = norm.running_mean[:7].clone()
    original = without(trained.stages[NUM_STEPS], "buffers", first="body.1.running_mean")
    replayer = trained.replayer(load)
    found = finding(NUM_STEPS, "buffers").with_(tensor="body.1.running_mean")
    verdict = diagnose(found, original, replayer, IMAGES, 0, Channel(), RunFacts(1))
    assert (verdict.cause, verdict.suspects) == ("unreplayed-state", [0])
    assert any(
        "torch.float32 (7,) on one side, torch.float32 (8,) on the other" in line for line in texts(verdict.evidence)
    )
    assert norm.running_mean.shape == (7,)


def test_bits_that_are_still_there_are_compared_with_the_replay() -> None:
    trained = train(with_momentum)
    with torch.no_grad():
        trained.replica.model.body[5].weight[0, 2] *= -1.0
    verdict = diagnosed(trained, NUM_STEPS, without(trained.stages[NUM_STEPS], "weights"))
    line = text_of(verdict.evidence, "original-elements-differ")
    assert "weights: tensors 1 of 6, elements 1, bits 1: body.5.weight: 1 of 2560 elements differ" in line
    assert "index [0, 2]" in line
    earlier = diagnosed(trained, 2, without(trained.stages[2], "weights"))
    assert "original-elements-differ" not in codes(earlier.evidence)


def test_replay_failure_is_evidence_and_state_is_restored() -> None:
    trained = train(with_momentum)
    before = everything(trained.replica)

    def fails(indices: Tensor, entry: StepEntry) -> Batch:
        if entry.step == 3:
            raise OSError("the disk is gone")
        return load(indices, entry)

    verdict = diagnosed(trained, 4, trained.stages[4], fails)
    assert verdict.cause == "unexplained"
    assert data_of(verdict.evidence, "replay-failed") == {"error": "replica 0 raised OSError: the disk is gone"}
    assert everything(trained.replica) == before


def test_failed_restore_is_reported_on_all_replicas() -> None:
    trained = train(with_momentum)
    replayer = trained.replayer(load)

    def fails() -> None:
        raise RuntimeError("unsupported operation: more than one element shares memory")

    replayer.close = fails  # type: ignore[method-assign]
    original = without(trained.stages[3], "weights")
    verdict = diagnose(finding(3), original, replayer, IMAGES, 0, Channel(), RunFacts(1))
    assert data_of(verdict.evidence, "restore-failed")["error"].startswith("replica 0 raised RuntimeError: unsupported")


class Stumbling:
    """A simulated replayer: before step 5, replica 1 fails to reproduce step 3, and replica 2 step 4."""

    def __init__(self, replica_id: int) -> None:
        self.stumbles = {1: 3, 2: 4}.get(replica_id)

    def approach(self, step: int) -> int | None:
        return self.stumbles if self.stumbles is not None and self.stumbles < step else None


def approached(world: World) -> tuple[int, bool]:
    replayer: Any = Stumbling(world.replica_id)
    return _approach(5, replayer, world.channel)


def test_only_first_unreproduced_replica_is_reported() -> None:
    assert run_replicas(approached, 3) == [(3, True), (3, False), (3, True)]


def test_an_earlier_step_that_does_not_reproduce_is_said() -> None:
    trained = train(with_momentum)
    entropy = random.SystemRandom()

    def other(indices: Tensor, entry: StepEntry) -> Batch:
        batch = load(indices, entry)
        inputs = batch.inputs + entropy.random() if entry.step == 2 else batch.inputs
        return Batch(batch.indices, inputs, batch.labels)

    verdict = diagnosed(trained, 4, trained.stages[4], other)
    assert data_of(verdict.evidence, "earlier-step-not-reproducible") == {"step": 2}
    assert verdict.cause == "unexplained", "the batches of step 4 had agreed"


def test_an_earlier_step_may_not_be_reached_the_second_time() -> None:
    """Step 2 differs in the first replay and step 1 in the second: a verdict, not an exception."""
    trained = train(with_momentum)
    seen: list[int] = []

    def other(indices: Tensor, entry: StepEntry) -> Batch:
        seen.append(entry.step)
        batch = load(indices, entry)
        changed = (entry.step == 2 and seen.count(2) == 1) or (entry.step == 1 and seen.count(1) == 2)
        return Batch(batch.indices, batch.inputs + 1.0 if changed else batch.inputs, batch.labels)

    assert diagnosed(trained, 4, trained.stages[4], other).cause in {"unexplained", "batch-differs"}


# ---- nondeterminism of an operator, not of the hardware


def on_gpus(**numerics: Any) -> RunFacts:
    strict = {
        "deterministic_algorithms": True,
        "deterministic_warn_only": False,
        "cudnn_benchmark": False,
        "cudnn_deterministic": True,
    }
    manifest = {"device": {"type": "cuda"}, "numerics": strict | numerics}
    return RunFacts(num_replicas=3, manifests=[manifest] * 3)


def found_in(operator: str, *kinds: Kind, **changes: Any) -> Decision:
    record = OpRecord(f"aten.{operator}.default", "body", "forward", b"", b"", "")
    found = Decision("unexplained", [1], [], OpDifference(0, record, record), (0, 1), groups=[[0, 2], [1]])
    findings = [Finding(kind) for kind in (Kind.REPLAYS_REPRODUCE, Kind.OPERATOR_MADE_IT, *kinds)]
    return replace(found, findings=findings, **changes)


OFF: dict[str, Any] = {"deterministic_algorithms": False, "cudnn_deterministic": False}
WRONG, POSSIBLE = Kind.PROVED_WRONG, Kind.BOTH_POSSIBLE


@pytest.mark.parametrize(
    ("found", "numerics", "cause", "suspects"),
    [
        (found_in("index_add", WRONG), OFF, "unexplained", [1]),
        (found_in("index_add", WRONG), {}, "persistent-fault", [1]),
        (found_in("mul", WRONG), OFF, "persistent-fault", [1]),
        (found_in("convolution", WRONG, settled=True), OFF, "persistent-fault", [1]),
        (found_in("convolution", POSSIBLE), {"cudnn_benchmark": True}, "nondeterministic-operator", [0, 1]),
        (found_in("convolution", POSSIBLE), {}, "unexplained", [1]),
        (found_in("convolution", POSSIBLE), OFF, "unexplained", [1]),
        (found_in("mm", POSSIBLE), OFF, "unexplained", [1]),
    ],
)
def test_possibly_nondeterministic_operator_is_not_a_fault(
    found: Decision, numerics: dict[str, Any], cause: str, suspects: list[int]
) -> None:
    """A result that an operator may vary alone is not blamed on the hardware."""
    decision = name_in(find_variation(found, on_gpus(**numerics)))
    assert (decision.cause, decision.suspects) == (cause, suspects)
