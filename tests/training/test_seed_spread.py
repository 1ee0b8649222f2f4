"""Spread of independent replicas, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.training.evaluate import Evaluation, Tally
from dreplica.training.seed_spread import Spread, measure_spread
from tests.harness import run_replicas

LABELS = torch.tensor([0, 1, 2, 0])
PROBABILITIES = torch.tensor(
    [
        # right, right, right, wrong (1)
        [[0.90, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.30, 0.40, 0.30]],
        # right, wrong (0), wrong (1), wrong (1)
        [[0.60, 0.30, 0.10], [0.5, 0.4, 0.1], [0.0, 0.8, 0.2], [0.35, 0.40, 0.25]],
        # right, wrong (2), right, right
        [[0.80, 0.10, 0.10], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8], [0.90, 0.05, 0.05]],
    ]
)
"""(replicas, samples, classes)."""


def evaluation(replica_id: int) -> Evaluation:
    return Evaluation(Tally.zero(torch.device("cpu")), PROBABILITIES[replica_id].clamp(min=1e-12).log(), LABELS, {})


def measure(world: World) -> Spread:
    return measure_spread(evaluation(world.replica_id), world.channel)


def test_spread_of_three_replicas() -> None:
    first, *others = run_replicas(measure, 3)
    assert others == [first, first]
    assert first.n == 3
    # Accuracies 3/4, 1/4, 3/4: mean 7/12; deviations 1/6, 1/3, 1/6, so variance (1/36 + 4/36 + 1/36) / 2 = 1/12.
    assert first.accuracy_mean == pytest.approx(7 / 12)
    assert first.accuracy_std == pytest.approx((1 / 12) ** 0.5)
    # Predictions 0121, 0011, 0220.
    assert first.disagreement == [[0, 0.5, 0.5], [0.5, 0, 0.75], [0.5, 0.75, 0]]
    # Sums: (2.3 0.45 0.25), (0.7 1.5 0.8), (0.2 1.1 1.7), (1.55 0.85 0.6): 0 1 2 0, all right, as no replica is.
    assert first.ensemble_accuracy == 1.0
    assert set(first.as_dict()) == {"n", "accuracy_mean", "accuracy_std", "disagreement", "ensemble_accuracy"}


def measure_wider(world: World) -> Spread:
    """Replica 1 has a fourth class, and is sure of it for the last sample."""
    own = evaluation(world.replica_id)
    if world.replica_id == 1:
        logits = torch.cat([own.logits, torch.full((4, 1), -30.0)], dim=1)
        logits[3, 3] = 30.0
        own = replace(own, logits=logits)
    return measure_spread(own, world.channel)


def test_spread_with_different_class_counts() -> None:
    first, *others = run_replicas(measure_wider, 3)
    assert others == [first, first]
    # Predictions 0121, 0013, 0220.
    assert first.disagreement == [[0, 0.75, 0.5], [0.75, 0, 0.75], [0.5, 0.75, 0]]
    # The last sample's sums: 0.3 + 0.9 of class 0, 0.45 of 1, 0.35 of 2, and 1 of replica 1's own class 3.
    assert first.ensemble_accuracy == 1.0
    assert first.accuracy_mean == pytest.approx(7 / 12)


def test_spread_of_one_replica() -> None:
    spread = measure_spread(evaluation(1), Channel())
    assert spread == Spread(1, 0.25, None, [[0.0]], 0.25)
