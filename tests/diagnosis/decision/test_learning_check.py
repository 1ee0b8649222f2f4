"""The learning check depends only on the trainable weights."""

import pytest
import torch
from torch import nn

from dreplica.diagnosis.decision.learning_check import LearningWatch
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from tests.fixtures import tiny_model
from tests.messages import texts


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def make_replica(lr: float = 0.1) -> Replica:
    seed_generators(3)
    model = tiny_model(5)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr))


def take_step(replica: Replica) -> None:
    replica.optimizer.zero_grad()
    logits = replica.model(torch.randn(4, 3, 8, 8))
    if logits.requires_grad:
        replica.criterion(logits, torch.arange(4)).backward()
    replica.optimizer.step()


def test_weights_that_move_learn() -> None:
    replica = make_replica()
    watch = LearningWatch(replica)
    take_step(replica)
    assert not watch.is_unchanged(replica)


def test_one_bit_of_one_weight_is_enough() -> None:
    replica = make_replica(lr=0.0)
    watch = LearningWatch(replica)
    take_step(replica)
    assert watch.is_unchanged(replica)
    with torch.no_grad():
        replica.model[5].bias[0] = torch.nextafter(replica.model[5].bias[0], torch.tensor(9.0))
    assert not watch.is_unchanged(replica)


def test_changing_buffers_are_not_learning() -> None:
    replica = make_replica(lr=0.0)
    watch = LearningWatch(replica)
    assert "buffers did not change" in watch.evidence(replica)[0].text
    take_step(replica)
    assert watch.is_unchanged(replica)
    trainable, gradients, rates = texts(watch.evidence(replica))
    assert trainable == "0 of 6 trainable parameters changed; buffers changed"
    assert "0 are None, 0 are all zero, of 6" in gradients
    assert "[0.0]" in rates


def test_frozen_weights_do_not_count() -> None:
    """A head on a frozen body learns; a body frozen whole has nothing that could."""
    replica = make_replica()
    for parameter in replica.model[:5].parameters():
        parameter.requires_grad_(False)
    watch = LearningWatch(replica)
    with torch.no_grad():
        replica.model[0].weight += 1.0  # changed by something else: no learning
    assert watch.is_unchanged(replica)
    take_step(replica)
    assert not watch.is_unchanged(replica)

    replica = make_replica()
    replica.model.requires_grad_(False)
    watch = LearningWatch(replica)
    take_step(replica)
    assert not watch.is_unchanged(replica), "there is nothing to learn, on purpose"


def test_gradients_that_are_missing_or_zero_are_counted() -> None:
    replica = make_replica()
    watch = LearningWatch(replica)
    replica.model[0].weight.grad = torch.zeros(8, 3, 3, 3)
    replica.model[5].bias.grad = torch.ones(5)
    assert "4 are None, 1 are all zero, of 6" in watch.evidence(replica)[1].text
