"""The training loop."""

import math
import time
from collections.abc import Generator
from contextlib import closing

import torch

from dreplica.agreement.agreement import Agreement
from dreplica.config.schema import RunConfig
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import LabelRange, load_batches
from dreplica.data.samples import DataSets, at_epoch
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.training.evaluate import Evaluation, Tally, evaluate
from dreplica.training.events import EpochDone, PhaseTimer, StepDone, Stopped, position_after
from dreplica.training.history import History, StepEntry
from dreplica.training.original import Original
from dreplica.training.step import reduction_of, training_step


def train(
    replica: Replica,
    data: DataSets,
    coordinator: IndexSampler,
    agreement: Agreement,
    config: RunConfig,
    world: World,
    device: torch.device,
    stop_request: StopRequest,
    history: History,
    start: Position = Position(),  # noqa: B008  # immutable
) -> Generator[StepDone | EpochDone | Stopped, None, None]:
    """Train a replica, compare every step, and yield an event after each step and epoch.

    Args:
        replica: The replica.
        data: Training and validation set.
        coordinator: Distributes the batch indices.
        agreement: Compares the replicas' states.
        config: The run's config.
        world: The replicas of the run.
        device: Device of the replica.
        stop_request: True once this replica has been asked to stop.
        history: Records what a replay needs.
        start: Position in the data to begin at. The replica's state is the state at this position.

    Yields:
        `StepDone` after each step, `EpochDone` after each epoch, and `Stopped` last if the run was asked to stop.

    Raises:
        Divergence: Replicas have diverged.
        ReplicaLost: A replica has failed or does not respond.

    Note:
        Collective: every rank must advance the generator at the same time.
    """
    batch_size, num_workers = config.data.batch_size, config.data.num_workers
    memory_format = torch.channels_last if config.model.channels_last else torch.preserve_format
    waits_for_device = agreement.hasher.is_asynchronous  # completing a comparison would wait for the device
    labels = LabelRange(data.num_classes, getattr(replica.criterion, "ignore_index", None))
    for epoch in range(start.epoch, config.train.epochs + 1):
        if agreement.steps_done >= (config.train.max_steps or math.inf):
            break  # a resumed run may have nothing left to do
        started = time.perf_counter()
        timer = PhaseTimer()
        number = start.num_batches if epoch == start.epoch else 0
        tally = Tally.of(start, device) if number else Tally.zero(device)
        count_before = tally.count
        if not number:
            replica.model.train()
        stream = coordinator.training_batches(len(data.train), batch_size, epoch, number)  # type: ignore[arg-type]
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
        with closing(batches):  # ends the loader's workers at once, in the middle of an epoch too
            for number, batch in enumerate(batches, start=number + 1):  # noqa: B020
                timer.lap("loading")
                if not waits_for_device:  # before this step overwrites what the last one left
                    agreement.complete()
                    history.settle(agreement.agreed_until)
                    timer.lap("checks")
                if history.meter is not None:
                    history.meter.start(batch)
                output = training_step(replica, batch, config.train, timer.lap)
                footprint = history.meter.stop(batch, output) if history.meter is not None else None
                step = agreement.steps_done + 1
                last = step == config.train.max_steps
                halts = step == config.run.stop_after
                saves = not last and step % (config.checkpoint.every_steps or step + 1) == 0
                stop = agreement.step(
                    indices=batch.indices,
                    batch=batch.tensors(),
                    outputs=output.logits,
                    loss=output.loss,
                    epoch=epoch,
                    stop=bool(stop_request),
                    check=last or saves or halts or number == len(stream),
                )
                entry = StepEntry(agreement.steps_done, epoch, number - 1, batch.indices, agreement.last_digest)
                original = None
                if footprint is not None and entry.word is not None:
                    kept = None if waits_for_device else batch
                    original = Original(kept, output, agreement.generator_states, footprint)
                history.step(entry, agreement.agreed_until, original)
                if saves or halts:
                    stop = agreement.complete()
                tally.add(output.loss, output.logits, batch.labels, reduction_of(replica.criterion))
                if world.monitor is not None:
                    world.monitor.step = agreement.steps_done
                timer.lap("checks")
                yield StepDone(step, epoch, number, len(stream), tally, saves, dict(timer.seconds))
                timer.lap("saving")
                if (stop or halts) and not last:
                    agreement.finish()
                    yield Stopped(agreement.steps_done, epoch, position_after(epoch, number, tally))
                    return
                if last:
                    break
        trained = time.perf_counter()
        timer.lap("loading")
        position = position_after(epoch, number, tally)
        if not waits_for_device:
            agreement.complete()
        rates = learning_rates(replica.optimizer)  # before the schedule sets those of the next epoch
        if number == len(stream):  # not if max_steps cut the epoch short
            replica.advance_scheduler("epoch")
            history.epoch_end(epoch)
            position = Position(epoch + 1)
        evaluation = evaluate(
            replica, data.val, coordinator, device, batch_size, num_workers, config.train, labels, agreement.hasher
        )
        timer.lap("evaluation")
        history.evaluated()
        agreement.evaluation({"logits": evaluation.logits}, epoch, evaluation.batches)
        timer.lap("checks")
        images_per_second = (tally.count - count_before) / (trained - started)
        step = agreement.steps_done
        yield _gather_epoch(step, epoch, tally, evaluation, started, images_per_second, position, world, timer, rates)
        if any(world.channel.gather(bool(stop_request))):  # requested during the evaluation
            yield Stopped(agreement.steps_done, epoch, position)
            break
        if agreement.steps_done == config.train.max_steps:
            break
    agreement.finish()


def _gather_epoch(
    step: int,
    epoch: int,
    tally: Tally,
    evaluation: Evaluation,
    started: float,
    images_per_second: float,
    position: Position,
    world: World,
    timer: PhaseTimer,
    rates: list[float],
) -> EpochDone:
    own = (tally.accuracy, tally.loss, evaluation.tally.accuracy, evaluation.tally.loss, images_per_second, rates)
    train_accuracy, train_loss, val_accuracy, val_loss, throughput, lr, *seconds = (
        list(row) for row in zip(*world.channel.gather((*own, *timer.seconds.values())), strict=True)
    )
    return EpochDone(
        epoch,
        step,
        train={"accuracy": train_accuracy, "loss": train_loss},
        val={"accuracy": val_accuracy, "loss": val_loss},
        seconds=time.perf_counter() - started,
        images_per_second=images_per_second,
        evaluation=evaluation,
        position=position,
        throughput=throughput,
        timing=dict(zip(timer.seconds, seconds, strict=True)),
        lr=lr,
    )


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rates of an optimizer's parameter groups in their order, equal ones once."""
    return list(dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups if "lr" in group))
