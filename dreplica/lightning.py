"""`AgreementCallback` for Lightning's Trainer; `lightning` is imported with this module alone."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from dreplica.agreement.agreement import Agreement


class AgreementCallback(Callback):
    """Compares all replicas after every step of the optimizer; `Divergence` stops them at the first difference.

    ::

        trainer = lightning.Trainer(callbacks=[AgreementCallback()], strategy="ddp", devices=2)

    Compared are the gradients that the step was taken with, the optimizers' state, schedulers and loss scaler included,
    and the weights; and where all must agree (without DDP) batch, loss, buffers and generators as well. Steps are
    counted as `trainer.global_step` counts them, where there is one optimizer; with several, batches that stepped any
    of them, on from what a checkpoint says if this callback was there when it was saved. Batches in which gradients are
    only accumulated are passed over.

    Args:
        arguments: `Agreement`'s, such as `every`, `lag`, `stages` or `on_divergence`.

    Attributes:
        agreement: None before training starts.
    """

    def __init__(self, **arguments: Any) -> None:
        self.agreement: Agreement | None = None
        self._arguments = arguments
        self._global_step = self._steps_done = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the build: models are wrapped by now, optimizers made and checkpoints loaded.

        Raises ValueError under a strategy that does not keep the whole state on every rank, unless `expect` was given.
        """
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy) and "expect" not in self._arguments:
            raise ValueError(
                f"strategy: {type(trainer.strategy).__name__} may keep other parts of the state on each rank, and they "
                "need not agree. Use strategy='ddp', or say what to expect: AgreementCallback(expect=..., stages=...)."
            )
        optimizers = trainer.optimizers
        several = {f"optimizer{number}": optimizer for number, optimizer in enumerate(optimizers)}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self._global_step != trainer.global_step:  # else it goes on where this callback, or the one saved, left off
            self._global_step = self._steps_done = trainer.global_step
        self.agreement = Agreement(
            trainer.strategy.model,
            optimizers[0] if len(optimizers) == 1 else several,
            others=[*schedulers, getattr(trainer.precision_plugin, "scaler", None)],
            steps_done=self._steps_done,
            **self._arguments,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares, if an optimizer has stepped; gradients stay until the next batch."""
        assert self.agreement is not None, "on_train_start() comes first"
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        self._steps_done += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss if isinstance(loss, Tensor) else None
        self.agreement.step(batch=batch, loss=loss, epoch=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completes what is under way."""
        assert self.agreement is not None, "on_train_start() comes first"
        self.agreement.finish()

    def state_dict(self) -> dict[str, int]:
        """How many steps are done, for the trainer's checkpoint."""
        return {"global_step": self._global_step, "steps_done": self._steps_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on counting from there."""
        self._global_step, self._steps_done = state_dict["global_step"], state_dict["steps_done"]
