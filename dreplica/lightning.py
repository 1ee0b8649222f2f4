"""`AgreementCallback` for Lightning's Trainer. Only this module of dreplica imports `lightning`."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.arguments import invalid_argument


class AgreementCallback(Callback):
    """Comparison of all replicas after every step of the optimizer, in Lightning's Trainer.

    ```python
    trainer = lightning.Trainer(callbacks=[AgreementCallback()], strategy="ddp", devices=2)
    ```

    All ranks raise `dreplica.Divergence` at the first difference. The callback compares the gradients of the step, the
    state of the optimizers, schedulers and loss scaler, and the weights. If all ranks must agree (without DDP), it also
    compares batch, loss, buffers and random number generators. Batches that only accumulate gradients are skipped.

    With one optimizer, steps are counted as `trainer.global_step` does. With several optimizers, they are the batches
    in which any of them stepped. The count continues from a checkpoint if this callback was there when it was saved.

    Args:
        keep_state: True to keep a copy of the state that each step begins with, for `dreplica.diagnose`: see
            `Agreement.keep_state`.
        **arguments: Arguments of `dreplica.Agreement`, such as `every`, `lag`, `stages` or `on_divergence`.

    Attributes:
        agreement: The `dreplica.Agreement`, or None before training starts.
    """

    def __init__(self, *, keep_state: bool = False, **arguments: Any) -> None:
        self.agreement: Agreement | None = None
        self._keep_state, self._begun = keep_state, -1
        self._arguments = arguments
        self._global_step = self._steps_done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the build, after models are wrapped, optimizers created and checkpoints loaded.

        Args:
            trainer: The trainer.
            pl_module: The module that it trains.

        Raises:
            UsageError: If the strategy shards the state over the ranks and `expect` was not passed.
            Divergence: If replicas differ.
        """
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy) and "expect" not in self._arguments:
            name = type(trainer.strategy).__name__
            text = (
                f"strategy: {name} may shard the state over the ranks, which then differ by design. Use "
                "strategy='ddp', or pass what must agree: AgreementCallback(expect=..., stages=...)."
            )
            raise invalid_argument("strategy", name, text, code="sharded-model")
        optimizers = trainer.optimizers
        several = {f"optimizer{number}": optimizer for number, optimizer in enumerate(optimizers)}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        # Equal if this callback, or the one whose state was loaded, counted up to here: then its count continues.
        if self._global_step != trainer.global_step:
            self._global_step = self._steps_done = trainer.global_step
        self.agreement = Agreement(
            trainer.strategy.model,
            optimizers[0] if len(optimizers) == 1 else several,
            others=[*schedulers, getattr(trainer.precision_plugin, "scaler", None)],
            steps_done=self._steps_done,
            **self._arguments,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the state that the step begins with, before the first of its accumulated batches.

        Args:
            trainer: The trainer.
            pl_module: The module that it trains.
            batch: The batch.
            batch_idx: Index of the batch in the epoch.
        """
        assert self.agreement is not None, "on_train_start() comes first"
        if self._keep_state and self._begun != self._steps_done:
            self._begun = self._steps_done
            self.agreement.keep_state()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the state if an optimizer has stepped. The gradients exist until the next batch.

        Args:
            trainer: The trainer.
            pl_module: The module that it trains.
            outputs: What `training_step` returned.
            batch: The batch.
            batch_idx: Index of the batch in the epoch.

        Raises:
            Divergence: If replicas differ.
        """
        assert self.agreement is not None, "on_train_start() comes first"
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._steps_done += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss if isinstance(loss, Tensor) else None
        self.agreement.step(batch=batch, loss=loss, epoch=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the comparison in progress."""
        assert self.agreement is not None, "on_train_start() comes first"
        self.agreement.finish()

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps done, for the trainer's checkpoint."""
        return {"global_step": self._global_step, "steps_done": self._steps_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue counting from a checkpoint."""
        self._global_step, self._steps_done = state_dict["global_step"], state_dict["steps_done"]
