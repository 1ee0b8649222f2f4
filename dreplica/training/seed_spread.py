"""Spread of the results of independent replicas, which is the seed noise of a result."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreplica.distributed.channel import Channel
from dreplica.training.evaluate import Evaluation


@dataclass(frozen=True)
class Spread:
    """Validation results of independent replicas."""

    n: int
    """Number of replicas."""
    accuracy_mean: float
    """Mean of the replicas' accuracies."""
    accuracy_std: float | None
    """Sample standard deviation (n - 1) of the accuracies. None for one replica."""
    disagreement: list[list[float]]
    """Matrix of replica pairs: fraction of validation samples for which the two predict different classes."""
    ensemble_accuracy: float
    """Accuracy of the mean of all replicas' softmax probabilities.

    A class that a replica's outputs do not have counts with probability 0.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return vars(self).copy()


def measure_spread(evaluation: Evaluation, channel: Channel) -> Spread:
    """Compare the last evaluations of all replicas.

    Note:
        Collective: call on every rank.
    """
    predicted = evaluation.logits.argmax(dim=1)
    rows = torch.zeros(channel.size, len(predicted), dtype=torch.int64)
    rows[channel.rank] = predicted
    rows = channel.sum(rows)
    num_classes = max(channel.gather(evaluation.logits.shape[1]))  # overrides may give replicas different ones
    probabilities = torch.zeros(len(predicted), num_classes, dtype=torch.float64)
    probabilities[:, : evaluation.logits.shape[1]] = evaluation.logits.double().softmax(dim=1)
    probabilities = channel.sum(probabilities)
    accuracies = [_accuracy(row, evaluation.labels) for row in rows]
    return Spread(
        n=channel.size,
        accuracy_mean=statistics.fmean(accuracies),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        disagreement=[[(one != other).double().mean().item() for other in rows] for one in rows],
        ensemble_accuracy=_accuracy(probabilities.argmax(dim=1), evaluation.labels),
    )


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).sum().item() / len(labels)
