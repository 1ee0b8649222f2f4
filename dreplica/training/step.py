"""One training step: the same function for the loop and for the replay, so that what is replayed is what was run."""

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
"""For a divisor that would be 0: the weights of a whole batch can be."""


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves besides the replica's own state; detached, on the replica's device."""

    loss: Tensor
    """0-dim: the batch's, as the criterion reduces it (mean or sum), weighted where the batch has weights."""
    logits: Tensor
    """(batch, num_classes)."""


def training_step(
    replica: Replica, batch: Batch, config: TrainConfig, lap: Callable[[str], None] = lambda _phase: None
) -> StepOutput:
    """Forward, backward and optimizer step on `batch`. The gradients stay in place until the next step.

    `lap` is called at the end of each phase, with its name: `PhaseTimer.lap`.
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
    """Loss (0-dim) and logits (batch, num_classes), under autocast if `train.amp` asks for it.

    With `weights` (batch,) the loss is `weighted_loss`. Raises UsageError if the model gives anything else.
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
    """The loss scaler that fp16 needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if config.amp == "fp16" else None


def reduction_of(criterion: nn.Module) -> str:
    """How the criterion makes one loss of a batch: `mean`, unless it says otherwise."""
    return getattr(criterion, "reduction", "mean")


def weighted_loss(criterion: nn.Module, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum(w_i l_i) / sum(w_i) over the batch, 0-dim, where l_i is what the criterion gives for sample i by itself.

    As `CrossEntropyLoss` does with the weights of its classes
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html), and together with them: where it
    has some, or labels that it ignores, the divisor is the sum of both weights' products, so that equal `weights`
    change nothing. Not divided where the criterion's reduction is `sum`; 0 where all weights are.
    """
    per_sample = copy.copy(criterion)  # shares its tensors
    per_sample.reduction = "none"  # type: ignore[assignment]  # nn.Module's attributes are tensors and modules to mypy
    losses = per_sample(logits, labels)
    total = (weights * losses.flatten(1).mean(1) if losses.dim() > 1 else weights * losses).sum()
    if reduction_of(criterion) == "sum":
        return total
    return total / _weight_of(criterion, labels, weights).clamp(min=_TINY)


def check_criterion_weighs(criterion: nn.Module, weights: Tensor | None) -> None:
    """Raises UsageError if there are sample weights, and a criterion that cannot give a loss for each sample."""
    if weights is not None and getattr(criterion, "reduction", None) not in {"mean", "sum"}:
        raise UsageError(
            f"data.sample_weights: a criterion of type {type(criterion).__name__} has no `reduction` of mean or sum to "
            "set to none, which gives a loss for each sample. Use one of torch's own, or set sample_weights to null."
        )


def _no_logits(given: Any, num_samples: int) -> UsageError:
    what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    return UsageError(
        f"model.factory: the model gives {what} for a batch of {num_samples}. Let its forward pass return logits "
        "alone, a tensor (batch, num_classes); wrap a model that returns more."
    )


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]  # not a view of it, which in-place operators refuse
    indices, inputs, labels = (tensor.chunk(parts) for tensor in (batch.indices, batch.inputs, batch.labels))
    weights = [None] * len(labels) if batch.weights is None else batch.weights.chunk(parts)
    return [Batch(*row) for row in zip(indices, inputs, labels, weights, strict=True)]


def _share(criterion: nn.Module, part: Batch, whole: Batch) -> float | Tensor:
    """What a part's mean loss counts in the batch's, from their labels and weights; a sum counts whole."""
    if reduction_of(criterion) == "sum" or len(part.labels) == len(whole.labels):
        return 1.0
    if whole.weights is None:
        if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
            return len(part.labels) / len(whole.labels)
        if criterion.weight is None and criterion.ignore_index < 0:
            return len(part.labels) / len(whole.labels)
    # These two divide by the weights of the labels that they do not ignore.
    part_weight, weight = (_weight_of(criterion, batch.labels, batch.weights) for batch in (part, whole))
    return part_weight / weight if whole.weights is None else part_weight / weight.clamp(min=_TINY)


def _weight_of(criterion: nn.Module, labels: Tensor, weights: Tensor | None) -> Tensor:
    """What the losses of these samples are divided by, for their mean; 0-dim."""
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
