"""One training step: the same function for the loop and for the replay, so that what is replayed is what was run."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreplica.data.loader import Batch
from dreplica.replica.replica import Replica
from dreplica.section import Lockstep, Section

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainConfig(Section):
    """How long, and how a step is taken."""

    epochs: Annotated[int, Lockstep()] = Field(1, ge=1)
    """Passes over the training set."""
    max_steps: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Stop after so many steps, even in mid-epoch; null: all of them."""
    amp: Literal["bf16", "fp16"] | None = None
    """Automatic mixed precision in the forward pass; fp16 scales the loss."""
    grad_clip: float | None = Field(None, gt=0)
    """Largest norm of all gradients together; null: not clipped."""
    accumulate: int = Field(1, ge=1)
    """Split each batch into so many parts and accumulate their gradients: the same step with less memory, up to
    rounding; only BatchNorm sees each part by itself."""


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves besides the replica's own state; detached, on the replica's device."""

    loss: Tensor
    """0-dim: the batch's, as the criterion reduces it (mean or sum)."""
    logits: Tensor
    """(batch, num_classes)."""


def training_step(replica: Replica, batch: Batch, config: TrainConfig) -> StepOutput:
    """Forward, backward and optimizer step on `batch`. The gradients stay in place until the next step."""
    replica.optimizer.zero_grad()
    losses, logits = [], []
    parts = min(config.accumulate, len(batch.labels))
    for inputs, labels in zip(batch.inputs.chunk(parts), batch.labels.chunk(parts), strict=True):
        part_loss, part_logits = forward(replica, inputs, labels, config)
        part_loss = part_loss * _share(replica.criterion, labels, batch.labels)
        (part_loss if replica.scaler is None else replica.scaler.scale(part_loss)).backward()
        losses.append(part_loss.detach())
        logits.append(part_logits.detach())
    _clip(replica, config.grad_clip)
    if replica.scaler is None:
        replica.optimizer.step()
    else:
        replica.scaler.step(replica.optimizer)
        replica.scaler.update()
    replica.steps_done += 1
    return StepOutput(torch.stack(losses).sum() if len(losses) > 1 else losses[0], torch.cat(logits))


def forward(replica: Replica, inputs: Tensor, labels: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss (0-dim) and logits (batch, num_classes), under autocast if `train.amp` asks for it."""
    dtype = _AMP_DTYPES.get(config.amp or "")
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
        logits = replica.model(inputs)
        loss = replica.criterion(logits, labels)
    return loss, logits


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that fp16 needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if config.amp == "fp16" else None


def reduction_of(criterion: nn.Module) -> str:
    """How the criterion makes one loss of a batch: `mean`, unless it says otherwise."""
    return getattr(criterion, "reduction", "mean")


def _share(criterion: nn.Module, part: Tensor, whole: Tensor) -> float | Tensor:
    """What a part's mean loss counts in the batch's, from their labels; a sum counts whole."""
    if reduction_of(criterion) == "sum" or len(part) == len(whole):
        return 1.0
    if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        return len(part) / len(whole)
    if criterion.weight is None and criterion.ignore_index < 0:
        return len(part) / len(whole)
    # These two divide by the weights of the labels that they do not ignore.
    return _weight_of(criterion, part) / _weight_of(criterion, whole)


def _weight_of(criterion: nn.CrossEntropyLoss | nn.NLLLoss, labels: Tensor) -> Tensor:
    weight = torch.ones((), device=labels.device) if criterion.weight is None else criterion.weight[labels.clamp(min=0)]
    return (weight * (labels != criterion.ignore_index)).sum()


def _clip(replica: Replica, max_norm: float | None) -> None:
    if max_norm is None:
        return
    if replica.scaler is not None:
        replica.scaler.unscale_(replica.optimizer)
    nn.utils.clip_grad_norm_(replica.model.parameters(), max_norm)
