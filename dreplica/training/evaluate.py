"""Evaluation of every replica on the whole validation set."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreplica.agreement.hasher import Hasher
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import LabelRange, load_batches
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.stages import batch_entries
from dreplica.training.step import forward, reduction_of


@dataclass
class Tally:
    """Correct predictions and loss summed over samples. Tensors are on the device: reading them synchronizes."""

    correct: Tensor
    """Number of correct predictions, 0-dim int64. An integer does not depend on the order of summation."""
    loss_sum: Tensor
    """Sum of the samples' losses, 0-dim float64 (float32 on MPS)."""
    count: int = 0
    """Number of samples."""

    @classmethod
    def zero(cls, device: torch.device) -> "Tally":
        """Return an empty tally."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=dtype, device=device))

    @classmethod
    def of(cls, position: Position, device: torch.device) -> "Tally":
        """Return the tally of the batches already trained on in the epoch of `position`."""
        tally = cls.zero(device)
        tally.correct += position.correct
        tally.loss_sum += position.loss_sum
        tally.count = position.count
        return tally

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, reduction: str = "mean") -> None:
        """Add a batch.

        Args:
            loss: Loss of the batch, 0-dim.
            logits: Shape (batch, num_classes).
            labels: Shape (batch,).
            reduction: How the criterion reduces: `mean` or `sum`.
        """
        self.correct += (logits.argmax(dim=1) == labels).sum()
        self.loss_sum += loss.detach().double() * (1 if reduction == "sum" else len(labels))
        self.count += len(labels)

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return self.correct.item() / self.count

    @property
    def loss(self) -> float:
        """Mean loss over samples."""
        return self.loss_sum.item() / self.count


@dataclass(frozen=True)
class Evaluation:
    """One replica's predictions for the validation set."""

    tally: Tally
    """Correct predictions and loss."""
    logits: Tensor
    """Predictions on the CPU, shape (samples, num_classes), in the data set's order."""
    labels: Tensor
    """Labels, shape (samples,), int64."""
    batches: dict[str, bytes]
    """A digest of 16 bytes over inputs and labels of each batch, by name."""


@torch.no_grad()
def evaluate(
    replica: Replica,
    dataset: Dataset,
    coordinator: IndexSampler,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    config: TrainConfig,
    rule: LabelRange | None = None,
    hasher: Hasher | None = None,
) -> Evaluation:
    """Evaluate a replica in eval mode, and restore the mode of every module.

    A GPU is synchronized once, at the end.

    Args:
        replica: The replica.
        dataset: The validation set.
        coordinator: Distributes the batch indices.
        device: Device of the replica.
        batch_size: Samples per batch.
        num_workers: Processes that load data; 0 to load in this one.
        config: Training settings, of which `amp` applies.
        rule: Valid labels. None to skip the check.
        hasher: Computes the batches' digests. None to compute them on the CPU.

    Returns:
        Predictions, counts and digests.

    Note:
        Collective: call on every rank.
    """
    modes = {module: module.training for module in replica.model.modules()}
    replica.model.eval()
    tally, logits, labels, observed = Tally.zero(device), [], [], []
    hasher = hasher or Hasher()
    stream = coordinator.evaluation_batches(len(dataset), batch_size)  # type: ignore[arg-type]
    for batch in load_batches(dataset, stream, device, num_workers, seed=0, epoch=0, labels=rule):
        loss, batch_logits = forward(replica, batch.inputs, batch.labels, config)
        tally.add(loss, batch_logits, batch.labels, reduction_of(replica.criterion))
        logits.append(batch_logits.to("cpu", non_blocking=True))
        labels.append(batch.labels.to("cpu", non_blocking=True))
        observed.append(hasher.start({"batch": batch_entries(batch.tensors())}))
    for module, training in modes.items():
        module.training = training
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    digests = (observation.stages["batch"].digest for observation in observed)
    batches = {f"validation batch {number}": digest for number, digest in enumerate(digests)}
    return Evaluation(tally, torch.cat(logits), torch.cat(labels), batches)
