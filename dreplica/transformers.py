"""`AgreementCallback` for Hugging Face's Trainer; `transformers` is imported with this module alone."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.subject import DDP_STAGES


class AgreementCallback(TrainerCallback):
    """Compares all replicas after every step of the optimizer; `Divergence` stops them at the first difference.

    ::

        trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[AgreementCallback()])

    Compared are the gradients that the step was taken with, the optimizer's state, scheduler and loss scaler included,
    and the weights; and buffers with `ddp_broadcast_buffers=False`. (The Trainer shows its callbacks neither batches
    nor losses.) Steps are counted as `TrainerState.global_step` counts them, however many batches each accumulates.

    Args:
        arguments: `Agreement`'s, such as `every`, `lag`, `stages` or `on_divergence`; with `expect="identical"` buffers
            and generators are compared, too, where every process trains a replica of its own.

    Attributes:
        agreement: None before training starts.
    """

    def __init__(self, **arguments: Any) -> None:
        self.agreement: Agreement | None = None
        self._arguments = arguments

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        **rest: Any,
    ) -> None:
        """Compares the build: the optimizer is made and a checkpoint loaded by now.

        Raises ValueError under FSDP and DeepSpeed, which keep other parts of the state on each rank, unless `expect`
        was given.
        """
        if (args.fsdp or args.deepspeed) and "expect" not in self._arguments:
            raise ValueError(
                "fsdp, deepspeed: each rank keeps another part of the state, and they need not agree. Leave them out, "
                "or say what to expect: AgreementCallback(expect=..., stages=...)."
            )
        arguments = dict(self._arguments)
        if (
            args.world_size > 1
            and arguments.setdefault("expect", "ddp") == "ddp"
            and args.ddp_broadcast_buffers is False
        ):
            arguments.setdefault("stages", (*DDP_STAGES, "buffers"))
        others = [lr_scheduler, getattr(optimizer, "scaler", None)]
        self.agreement = Agreement(model, optimizer, others=others, steps_done=state.global_step, **arguments)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Compares while the gradients are there: they are set to zero before `on_step_end`."""
        assert self.agreement is not None, "on_train_begin() comes first"
        self.agreement.step(epoch=int(state.epoch or 0) + 1)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Completes what is under way."""
        assert self.agreement is not None, "on_train_begin() comes first"
        self.agreement.finish()
