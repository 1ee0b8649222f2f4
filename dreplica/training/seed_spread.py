"""How far independent replicas differ: how much of a result is seed noise."""

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
    accuracy_mean: float
    accuracy_std: float | None
    """Sample standard deviation (n - 1); None for one replica."""
    disagreement: list[list[float]]
    """Replica by replica: the part of the validation samples on which the two predict different classes."""
    ensemble_accuracy: float
    """Of the mean of all replicas' softmax probabilities; 0 for a class that a replica's outputs do not have."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return vars(self).copy()


def measure_spread(evaluation: Evaluation, channel: Channel) -> Spread:
    """Compares the last evaluations of all replicas. A collective."""
    predicted = evaluation.logits.argmax(dim=1)
    rows = torch.zeros(channel.size, len(predicted), dtype=torch.int64)
    rows[channel.rank] = predicted
    rows = channel.sum(rows)
    num_classes = max(channel.gather(evaluation.logits.shape[1]))  # overrides and factories can give each its own
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
