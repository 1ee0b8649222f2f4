"""The training loop."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dreplica.agreement.agreement import Agreement
from dreplica.data.coordinator import Coordinator
from dreplica.data.loader import Labels, load_batches
from dreplica.data.samples import DataSets, at_epoch
from dreplica.replica.replica import Replica
from dreplica.training.evaluate import Evaluation, Tally, evaluate
from dreplica.training.history import History, StepEntry
from dreplica.training.step import reduction_of, training_step
from dreplica.world.process_group import World
from dreplica.world.signals import StopRequest

if TYPE_CHECKING:
    from dreplica.config import RunConfig


@dataclass(frozen=True)
class StepDone:
    """A step was taken."""

    step: int
    epoch: int
    step_in_epoch: int
    steps_in_epoch: int
    tally: Tally
    """Of this epoch's steps so far, on this replica."""


@dataclass(frozen=True)
class EpochDone:
    """An epoch was trained and evaluated; one value per replica in each list."""

    epoch: int
    step: int
    train: dict[str, list[float]]
    val: dict[str, list[float]]
    seconds: float
    images_per_second: float
    """Training samples of one replica per second of training."""
    evaluation: Evaluation | None
    """This replica's predictions."""

    def without_predictions(self) -> "EpochDone":
        """A copy that does not keep them in memory."""
        return replace(self, evaluation=None)

    def as_dict(self) -> dict[str, Any]:
        """What report.json says of it."""
        return {"epoch": self.epoch, "train": self.train, "val": self.val}


@dataclass(frozen=True)
class Stopped:
    """A replica wanted to stop, and all have, after the same step."""

    step: int
    epoch: int


def train(
    replica: Replica,
    data: DataSets,
    coordinator: Coordinator,
    agreement: Agreement,
    config: "RunConfig",
    world: World,
    device: torch.device,
    stop_request: StopRequest,
    history: History,
) -> Generator[StepDone | EpochDone | Stopped, None, None]:
    """Trains, step by step, and yields what has been done. A collective: replicas advance it in lock-step.

    Raises `Divergence` when replicas part and `ReplicaLost` when one is gone.
    """
    batch_size, num_workers = config.data.batch_size, config.data.num_workers
    memory_format = torch.channels_last if config.model.channels_last else torch.preserve_format
    labels = Labels(data.num_classes, getattr(replica.criterion, "ignore_index", None))
    for epoch in range(1, config.train.epochs + 1):
        started = time.perf_counter()
        tally = Tally.zero(device)
        replica.model.train()
        stream = coordinator.training_batches(len(data.train), batch_size, epoch)  # type: ignore[arg-type]
        batches = load_batches(
            at_epoch(data.train, epoch),
            stream,
            device,
            num_workers,
            coordinator.seed,
            epoch,
            memory_format,
            labels=labels,
            weights=data.weights,
        )
        with closing(batches):  # ends the loader's workers at once, also in mid-epoch
            for number, batch in enumerate(batches, start=1):
                output = training_step(replica, batch, config.train)
                last = agreement.steps_done + 1 == config.train.max_steps
                stop = agreement.step(
                    indices=batch.indices,
                    batch=batch.tensors(),
                    outputs=output.logits,
                    loss=output.loss,
                    epoch=epoch,
                    stop=bool(stop_request),
                    check=last or number == len(stream),
                )
                generator = torch.get_rng_state().numpy().tobytes()
                history.step(
                    StepEntry(agreement.steps_done, epoch, number - 1, batch.indices, agreement.last_word, generator),
                    agreement.agreed_until,
                )
                tally.add(output.loss, output.logits, batch.labels, reduction_of(replica.criterion))
                if world.roll_call is not None:
                    world.roll_call.step = agreement.steps_done
                yield StepDone(agreement.steps_done, epoch, number, len(stream), tally)
                if stop:
                    agreement.finish()
                    yield Stopped(agreement.steps_done, epoch)
                    return
                if last:
                    break
        trained = time.perf_counter()
        if number == len(stream):  # not if max_steps cut the epoch short
            if replica.scheduler is not None:
                replica.scheduler.step()
            history.epoch_end(epoch)
        evaluation = evaluate(replica, data.val, coordinator, device, batch_size, num_workers, config.train, labels)
        history.evaluated()
        agreement.evaluation({"logits": evaluation.logits}, epoch, evaluation.batches)
        yield _gather_epoch(epoch, agreement.steps_done, tally, evaluation, started, trained, world)
        if any(world.channel.gather(bool(stop_request))):  # with agreement.every 0 no step's message carries it
            yield Stopped(agreement.steps_done, epoch)
            break
        if agreement.steps_done == config.train.max_steps:
            break
    agreement.finish()


def _gather_epoch(
    epoch: int, step: int, tally: Tally, evaluation: Evaluation, started: float, trained: float, world: World
) -> EpochDone:
    own = (tally.accuracy, tally.loss, evaluation.tally.accuracy, evaluation.tally.loss)
    train_accuracy, train_loss, val_accuracy, val_loss = (
        list(row) for row in zip(*world.channel.gather(own), strict=True)
    )
    return EpochDone(
        epoch,
        step,
        train={"accuracy": train_accuracy, "loss": train_loss},
        val={"accuracy": val_accuracy, "loss": val_loss},
        seconds=time.perf_counter() - started,
        images_per_second=tally.count / (trained - started),
        evaluation=evaluation,
    )
