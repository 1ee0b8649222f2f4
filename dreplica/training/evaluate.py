"""Evaluation: the whole validation set, in eval mode, on every replica."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreplica.agreement.hasher import Hasher
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.index_stream import Coordinator
from dreplica.data.loading.loader import Labels, load_batches
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.stages import batch_entries
from dreplica.training.step import forward, reduction_of


@dataclass
class Tally:
    """Counts over the samples seen so far, kept on the replica's device: reading them waits for it."""

    correct: Tensor
    """0-dim int64: an integer, so that it does not depend on the order of summation."""
    loss_sum: Tensor
    """0-dim float64."""
    count: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> "Tally":
        """An empty tally."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=dtype, device=device))

    @classmethod
    def of(cls, position: Position, device: torch.device) -> "Tally":
        """The tally of the batches of its epoch that were done at `position`."""
        tally = cls.zero(device)
        tally.correct += position.correct
        tally.loss_sum += position.loss_sum
        tally.count = position.count
        return tally

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, reduction: str = "mean") -> None:
        """Adds a batch: its loss (0-dim; `reduction`: mean or sum), logits (batch, num_classes), labels (batch,)."""
        self.correct += (logits.argmax(dim=1) == labels).sum()
        self.loss_sum += loss.detach().double() * (1 if reduction == "sum" else len(labels))
        self.count += len(labels)

    @property
    def accuracy(self) -> float:
        """Correct predictions over samples."""
        return self.correct.item() / self.count

    @property
    def loss(self) -> float:
        """Mean over samples."""
        return self.loss_sum.item() / self.count


@dataclass(frozen=True)
class Evaluation:
    """What one replica predicts for the validation set."""

    tally: Tally
    logits: Tensor
    """(samples, num_classes), on the CPU, in the data set's order."""
    labels: Tensor
    """(samples,) int64."""
    batches: dict[str, bytes]
    """What the predictions were made from: a digest of 16 bytes for each batch, inputs and labels."""


@torch.no_grad()
def evaluate(
    replica: Replica,
    dataset: Dataset,
    coordinator: Coordinator,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    config: TrainConfig,
    rule: Labels | None = None,
    hasher: Hasher | None = None,
) -> Evaluation:
    """Evaluates in eval mode and puts every module back into the mode it was in. A collective.

    `rule`: what labels may be; None: not checked. `hasher`: takes the batches' digests; by default on the CPU. A GPU is
    waited for at the end only.
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
