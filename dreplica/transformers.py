"""`AgreementCallback` for Hugging Face's Trainer. Only this module of dreplica imports `transformers`."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.arguments import invalid_argument
from dreplica.agreement.subject import DDP_STAGES


class AgreementCallback(TrainerCallback):
    """Comparison of all replicas after every step of the optimizer, in Hugging Face's Trainer.

    ```python
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[AgreementCallback()])
    ```

    All ranks raise `dreplica.Divergence` at the first difference. The callback compares the gradients of the step, the
    state of the optimizer, scheduler and loss scaler, and the weights; with `ddp_broadcast_buffers=False` also the
    buffers. The Trainer passes neither batches nor losses to its callbacks. Steps are counted as
    `TrainerState.global_step` does, for any number of accumulated batches.

    Args:
        keep_state: True to keep a copy of the state that each step begins with, for `dreplica.diagnose`: see
            `Agreement.keep_state`.
        **arguments: Arguments of `dreplica.Agreement`, such as `every`, `lag`, `stages` or `on_divergence`. Use
            `expect="identical"` if every process trains an independent replica: buffers and random number generators
            are then compared, too.

    Attributes:
        agreement: The `dreplica.Agreement`, or None before training starts.
    """

    def __init__(self, *, keep_state: bool = False, **arguments: Any) -> None:
        self.agreement: Agreement | None = None
        self._keep_state = keep_state
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
        """Compare the build, after the optimizer is created and a checkpoint loaded.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control flags.
            model: The model.
            optimizer: The optimizer.
            lr_scheduler: The learning rate scheduler.
            **rest: Further arguments of the hook, which are ignored.

        Raises:
            UsageError: If FSDP or DeepSpeed shards the state over the ranks and `expect` was not passed.
            Divergence: If replicas differ.
        """
        if (args.fsdp or args.deepspeed) and "expect" not in self._arguments:
            name = "fsdp" if args.fsdp else "deepspeed"
            text = (
                f"{name} shards the state over the ranks, which then differ by design. Disable it, or pass what must "
                "agree: AgreementCallback(expect=..., stages=...)."
            )
            raise invalid_argument(name, getattr(args, name), text, code="sharded-model")
        arguments = dict(self._arguments)
        if (
            args.world_size > 1
            and arguments.setdefault("expect", "ddp") == "ddp"
            and args.ddp_broadcast_buffers is False
        ):
            arguments.setdefault("stages", (*DDP_STAGES, "buffers"))
        others = [lr_scheduler, getattr(optimizer, "scaler", None)]
        self.agreement = Agreement(model, optimizer, others=others, steps_done=state.global_step, **arguments)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Keep the state that the step begins with, before the first of its accumulated batches.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control flags.
            **rest: Further arguments of the hook, which are ignored.
        """
        assert self.agreement is not None, "on_train_begin() comes first"
        if self._keep_state:
            self.agreement.keep_state()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Compare the state while the gradients exist, since they are set to zero before `on_step_end`.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control flags.
            **rest: Further arguments of the hook, which are ignored.

        Raises:
            Divergence: If replicas differ.
        """
        assert self.agreement is not None, "on_train_begin() comes first"
        self.agreement.step(epoch=int(state.epoch or 0) + 1)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Complete the comparison in progress.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control flags.
            **rest: Further arguments of the hook, which are ignored.
        """
        assert self.agreement is not None, "on_train_begin() comes first"
        self.agreement.finish()
