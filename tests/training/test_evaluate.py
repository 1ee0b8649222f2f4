"""Evaluation: in real eval mode, and without a trace in what it evaluates."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.samples import TensorImages
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.evaluate import Evaluation, Tally, evaluate
from tests.fixtures import tiny_images, tiny_model
from tests.state.fingerprint.late import LateHasher

CPU = torch.device("cpu")
NUM_VAL = 37
"""Not a multiple of the batch size, 16: the last batch is smaller."""


class Watched(nn.Module):
    """Notes in what mode each of its forward passes runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model(5)
        self.seen: list[tuple[bool, bool, bool, int]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.inner(inputs)
        any_training = any(module.training for module in self.modules())
        self.seen.append((any_training, torch.is_grad_enabled(), outputs.requires_grad, len(inputs)))
        return outputs


def make_replica(criterion: nn.Module | None = None) -> Replica:
    seed_generators(2)
    model = Watched().train()
    return Replica(model, criterion or nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


def validation() -> TensorImages:
    _, val, _ = tiny_images(None)  # type: ignore[arg-type]
    return TensorImages(val.images[:NUM_VAL], val.labels[:NUM_VAL])


def run(replica: Replica, num_workers: int = 0, **train: Any) -> Evaluation:
    config = TrainConfig.model_validate(train)
    return evaluate(replica, validation(), IndexSampler(Channel(), 0), CPU, 16, num_workers, config)


def surroundings(replica: Replica) -> tuple[Any, ...]:
    tensors = [*replica.model.parameters(), *replica.model.buffers(), torch.get_rng_state()]
    numpy_state = numpy.random.get_state()
    return (
        [tensor.detach().numpy().tobytes() for tensor in tensors],
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2:],
        [parameter.grad for parameter in replica.model.parameters()],
        [module.training for module in replica.model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluate_keeps_state(num_workers: int) -> None:
    replica = make_replica()
    replica.model.inner[1].eval()  # a frozen BatchNorm stays frozen
    before = surroundings(replica)
    run(replica, num_workers)
    assert surroundings(replica) == before
    assert [module.training for module in replica.model.inner] == [True, False, True, True, True, True]


def test_evaluate_in_eval_mode_without_gradients() -> None:
    replica = make_replica()
    evaluation = run(replica)
    assert replica.model.seen == [(False, False, False, 16), (False, False, False, 16), (False, False, False, 5)]
    assert not evaluation.logits.requires_grad


@pytest.mark.process
def test_predictions_are_in_data_set_order() -> None:
    replica = make_replica()
    data = validation()
    evaluation = run(replica)
    replica.model.eval()
    with torch.no_grad():
        logits = torch.cat([replica.model(images) for images in data.images.split(16)])
    assert evaluation.logits.numpy().tobytes() == logits.numpy().tobytes()
    assert evaluation.labels.equal(data.labels)
    assert run(replica, num_workers=1).logits.numpy().tobytes() == logits.numpy().tobytes()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tally_counts_integers_and_mean_loss(reduction: str) -> None:
    replica = make_replica(nn.CrossEntropyLoss(reduction=reduction))
    evaluation = run(replica)
    tally = evaluation.tally
    right = int((evaluation.logits.argmax(dim=1) == validation().labels).sum())
    assert tally.correct.dtype == torch.int64
    assert (tally.correct.item(), tally.count) == (right, NUM_VAL)
    assert 0 < right < NUM_VAL
    assert tally.accuracy == right / NUM_VAL
    losses = nn.functional.cross_entropy(evaluation.logits.double(), validation().labels, reduction="none")
    assert tally.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    unweighted = torch.stack([part.mean() for part in losses.split(16)]).mean().item()
    assert tally.loss != pytest.approx(unweighted, rel=1e-6), "a smaller last batch must weigh less"


def test_evaluate_with_mixed_precision() -> None:
    assert run(make_replica(), amp="bf16").logits.dtype == torch.bfloat16


def test_tally_adds_batches() -> None:
    tally = Tally.zero(CPU)
    tally.add(torch.tensor(2.0), torch.eye(3), torch.tensor([0, 1, 0]))
    tally.add(torch.tensor(6.0), torch.eye(3)[:1], torch.tensor([0]))
    assert (tally.correct.item(), tally.count, tally.accuracy, tally.loss) == (3, 4, 0.75, 3.0)


class _LastOfAll(LateHasher):
    """Notes whether digests were waited for while batches were still to come."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_by_then: list[int] = []

    def start(self, stages: Any) -> Any:
        self.waited_by_then.append(len(self.waited))
        return super().start(stages)


def test_evaluate_reads_digests_at_end() -> None:
    hasher = _LastOfAll()
    replica = make_replica()
    evaluation = evaluate(replica, validation(), IndexSampler(Channel(), 0), CPU, 16, 0, TrainConfig(), hasher=hasher)
    assert hasher.waited_by_then == [0, 0, 0]
    assert hasher.waited == [0, 1, 2]
    batches = zip(validation().images.split(16), validation().labels.split(16), strict=True)
    expected = [LateHasher().start({"batch": {"inputs": x, "labels": y}.items()}).stages for x, y in batches]
    assert list(evaluation.batches.values()) == [stages["batch"].digest for stages in expected]
    assert evaluation.batches.keys() == run(replica).batches.keys()
    assert set(evaluation.batches.values()).isdisjoint(run(replica).batches.values())
