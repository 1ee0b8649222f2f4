"""The training step. The loop and replays call the same function, so that a replay repeats what was run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.errors import UsageError
from dreplica.state.replica import Replica

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TINY = torch.finfo(torch.float32).tiny
"""Smallest divisor: all sample weights of a batch may be 0."""


@dataclass(frozen=True)
class StepOutput:
    """Loss and logits of a step, detached, on the replica's device."""

    loss: Tensor
    """Loss of the batch, 0-dim, reduced by the criterion (mean or sum) and weighted if the batch has weights."""
    logits: Tensor
    """Outputs of the model, shape (batch, num_classes)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that replicas compare as stage `output`, by name."""
        return {"logits": self.logits, "loss": self.loss}


def training_step(
    replica: Replica, batch: Batch, config: TrainConfig, lap: Callable[[str], None] = lambda _phase: None
) -> StepOutput:
    """Run forward pass, backward pass and optimizer step on a batch.

    Gradients are kept until the next step.

    Args:
        replica: The replica.
        batch: The batch, on the replica's device.
        config: Training settings: accumulation, clipping and precision.
        lap: Called with the name of each phase when it ends, as `PhaseTimer.lap` is.
    """
    replica.optimizer.zero_grad()
    losses, logits = [], []
    parts = min(config.accumulate, len(batch.labels))
    for part in _split(batch, parts):
        part_loss, part_logits = forward(replica, part.inputs, part.labels, config, part.weights)
        part_loss = part_loss * _share(replica.criterion, part, batch)
        lap("forward")
        (part_loss if replica.scaler is None else replica.scaler.scale(part_loss)).backward()
        lap("backward")
        losses.append(part_loss.detach())
        logits.append(part_logits.detach())
    _clip(replica, config.grad_clip)
    if replica.scaler is None:
        replica.optimizer.step()
    else:
        replica.scaler.step(replica.optimizer)
        replica.scaler.update()
    replica.advance_scheduler("step")
    replica.steps_done += 1
    lap("optimizer")
    return StepOutput(torch.stack(losses).sum() if len(losses) > 1 else losses[0], torch.cat(logits))


def forward(
    replica: Replica, inputs: Tensor, labels: Tensor, config: TrainConfig, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute loss and logits, under autocast if `train.amp` is set.

    Args:
        replica: The replica.
        inputs: Shape (batch, ...).
        labels: Shape (batch,).
        config: Training settings.
        weights: Weight of each sample, shape (batch,). None for the criterion's own reduction.

    Returns:
        Loss, 0-dim, and logits, shape (batch, num_classes).

    Raises:
        UsageError: The model does not return a tensor with one row per sample.
    """
    dtype = _AMP_DTYPES.get(config.amp or "")
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
        logits = replica.model(inputs)
        if not isinstance(logits, Tensor) or logits.shape[:1] != labels.shape[:1]:
            raise _no_logits(logits, len(labels))
        if weights is None:
            loss = replica.criterion(logits, labels)
        else:
            loss = weighted_loss(replica.criterion, logits, labels, weights)
    return loss, logits


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the gradient scaler that fp16 needs, or None."""
    return torch.amp.GradScaler(device.type) if config.amp == "fp16" else None


def reduction_of(criterion: nn.Module) -> str:
    """Return the criterion's reduction, `mean` if it has none."""
    return getattr(criterion, "reduction", "mean")


def weighted_loss(criterion: nn.Module, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Compute sum(w_i l_i) / sum(w_i) over a batch, where l_i is the criterion's loss for sample i alone.

    This is what `CrossEntropyLoss` does with class weights
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html), and it combines with them: with
    class weights or ignored labels, the divisor is the sum of the products of both weights, so that equal `weights`
    change nothing. With reduction `sum` there is no divisor. If all weights are 0, the loss is 0.

    Args:
        criterion: The loss function, with a `reduction` of mean or sum.
        logits: Shape (batch, num_classes).
        labels: Shape (batch,).
        weights: Shape (batch,).

    Returns:
        The loss, 0-dim.
    """
    per_sample = copy.copy(criterion)  # shares its tensors
    per_sample.reduction = "none"  # type: ignore[assignment]  # to mypy, nn.Module's attributes are tensors and modules
    losses = per_sample(logits, labels)
    total = (weights * losses.flatten(1).mean(1) if losses.dim() > 1 else weights * losses).sum()
    if reduction_of(criterion) == "sum":
        return total
    return total / _weight_of(criterion, labels, weights).clamp(min=_TINY)


def check_criterion_weighs(criterion: nn.Module, weights: Tensor | None) -> None:
    """Check that the criterion can compute a loss per sample if there are sample weights.

    Raises:
        UsageError: The criterion's reduction is neither mean nor sum.
    """
    if weights is not None and getattr(criterion, "reduction", None) not in {"mean", "sum"}:
        raise UsageError(
            f"data.sample_weights: expected a criterion with `reduction` mean or sum, got a {type(criterion).__name__} "
            "without. A loss per sample is computed with `reduction` none. Use a criterion of torch.nn, or set "
            "data.sample_weights to null.",
            code="criterion-without-reduction",
            criterion=type(criterion).__name__,
        )


def _no_logits(given: Any, num_samples: int) -> UsageError:
    got = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    return UsageError(
        f"model.factory: expected a model that returns logits, a tensor of shape ({num_samples}, num_classes) for a "
        f"batch of {num_samples}, got {got}. Wrap the model so that its forward pass returns only logits.",
        code="model-without-logits",
        got=got,
        num_samples=num_samples,
    )


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]  # not a view, on which in-place operators raise
    indices, inputs, labels = (tensor.chunk(parts) for tensor in (batch.indices, batch.inputs, batch.labels))
    weights = [None] * len(labels) if batch.weights is None else batch.weights.chunk(parts)
    return [Batch(*row) for row in zip(indices, inputs, labels, weights, strict=True)]


def _share(criterion: nn.Module, part: Batch, whole: Batch) -> float | Tensor:
    """Return the factor of a part's loss in the batch's loss: 1 for a sum, else its fraction of the weights."""
    if reduction_of(criterion) == "sum" or len(part.labels) == len(whole.labels):
        return 1.0
    if whole.weights is None:
        if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
            return len(part.labels) / len(whole.labels)
        if criterion.weight is None and criterion.ignore_index < 0:
            return len(part.labels) / len(whole.labels)
    # These two criteria divide by the weights of the labels that they do not ignore.
    part_weight, weight = (_weight_of(criterion, batch.labels, batch.weights) for batch in (part, whole))
    return part_weight / weight if whole.weights is None else part_weight / weight.clamp(min=_TINY)


def _weight_of(criterion: nn.Module, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the divisor of the samples' mean loss, 0-dim."""
    weight = torch.ones((), device=labels.device) if weights is None else weights
    if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) or labels.is_floating_point():
        return weight.sum()
    if criterion.weight is not None:
        weight = weight * criterion.weight[labels.clamp(min=0)]
    return (weight * (labels != criterion.ignore_index)).sum()


def _clip(replica: Replica, max_norm: float | None) -> None:
    if max_norm is None:
        return
    if replica.scaler is not None:
        replica.scaler.unscale_(replica.optimizer)
    nn.utils.clip_grad_norm_(replica.model.parameters(), max_norm)
