"""Sample weights in the step: the weighted mean, whole or in parts, with everything else that weighs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.training.step import check_criterion_weighs, training_step, weighted_loss

NUM, CLASSES = 7, 3


def batch(weights: Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM, 5, generator=generator, dtype=torch.float64)
    return Batch(torch.arange(NUM), inputs, torch.tensor([0, 1, 2, 0, 1, 2, 2]), weights)


def gradient(criterion: nn.Module, of: Batch, accumulate: int = 1) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one step of a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(5, CLASSES).double()
    replica = Replica(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = training_step(replica, of, TrainConfig(accumulate=accumulate)).loss
    assert model.weight.grad is not None
    return loss, model.weight.grad


CRITERIA = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)),
    nn.CrossEntropyLoss(ignore_index=2),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MultiMarginLoss(),
]
some_weights = st.lists(st.floats(0.125, 4, width=32), min_size=NUM, max_size=NUM).map(torch.tensor)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@settings(max_examples=15, deadline=None)
@given(weights=some_weights, accumulate=st.integers(1, 8))
def test_weights_equal_repeated_samples(criterion: Any, weights: Tensor, accumulate: int) -> None:
    loss, grad = gradient(criterion, batch(weights))
    in_parts = gradient(criterion, batch(weights), accumulate)
    torch.testing.assert_close((loss, grad), in_parts)
    if criterion.reduction == "mean":
        torch.testing.assert_close((loss, grad), gradient(criterion, batch(2 * weights)))
    # A sample of weight n is as n samples of weight 1.
    times = (4 * weights).round().long().clamp(min=1)
    whole = batch(None)
    repeated = Batch(
        torch.arange(int(times.sum())), whole.inputs.repeat_interleave(times, 0), whole.labels.repeat_interleave(times)
    )
    torch.testing.assert_close(gradient(criterion, batch(times.double())), gradient(criterion, repeated))


@given(some_weights)
def test_weighted_loss_is_weighted_mean(weights: Tensor) -> None:
    of = batch(weights.double())
    logits = of.inputs[:, :CLASSES]
    losses = nn.functional.cross_entropy(logits, of.labels, reduction="none")
    found = weighted_loss(nn.CrossEntropyLoss(), logits, of.labels, weights.double())
    torch.testing.assert_close(found, (weights * losses).sum() / weights.sum(), check_dtype=False)


def test_weighted_loss_keeps_criterion() -> None:
    criterion = nn.MSELoss()
    logits, targets = torch.arange(12.0).view(4, 3), torch.zeros(4, 3)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    rows = (logits**2).mean(1)
    assert weighted_loss(criterion, logits, targets, weights).equal((weights * rows).sum() / 4)
    assert criterion.reduction == "mean"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batch_of_weight_zero_changes_nothing(accumulate: int) -> None:
    loss, grad = gradient(nn.CrossEntropyLoss(), batch(torch.zeros(NUM)), accumulate)
    assert loss == 0
    assert not grad.any()


class Own(nn.Module):
    """A criterion without a reduction."""


def test_criterion_without_reduction_is_usage_error() -> None:
    weights = torch.ones(3)
    for criterion in (nn.CrossEntropyLoss(), nn.NLLLoss(reduction="sum")):
        check_criterion_weighs(criterion, weights)
    check_criterion_weighs(Own(), None)
    for criterion in (Own(), nn.CrossEntropyLoss(reduction="none")):
        with pytest.raises(UsageError, match=r"^data.sample_weights: expected a criterion with `reduction`"):
            check_criterion_weighs(criterion, weights)
