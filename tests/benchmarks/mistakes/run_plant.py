"""Running one plant in the trainer, in a custom loop, or in DDP, to its verdict."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dreplica
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.decision.learning_check import LearningWatch
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.device import Device
from dreplica.run.bootstrap import Prepared
from dreplica.run.session import Concluded, Session
from dreplica.state.rng import seed_generators
from dreplica.training.events import EpochDone
from tests.benchmarks.mistakes import site as sites
from tests.benchmarks.mistakes.site import BATCH, STEPS, TRAINING_SAMPLES, Samples, Site, training_step

PER_EPOCH = TRAINING_SAMPLES // BATCH
CONFIG = RunConfig.model_validate(
    {
        "replica": {"factory": "tests.benchmarks.mistakes.site:make_replica"},
        "data": {"name": "tests.benchmarks.mistakes.site:make_data", "batch_size": BATCH},
        "train": {"epochs": STEPS // PER_EPOCH},
        "agreement": {"snapshot_every": 3},
        "world": {"device": "cpu"},
    }
)


def run_plant(site: Site, world: World) -> Verdict | None:
    """Train with a mistake and return the verdict, None if replicas agree.

    Note:
        Collective: call on every rank.
    """
    sites.enter(site)
    logging.disable(logging.WARNING)
    try:
        return _run_trainer(site, world) if site.setting == "trainer" else _run_loop(site, world)
    finally:
        site.close()
        sites.enter(None)
        logging.disable(logging.NOTSET)


def _run_trainer(site: Site, world: World) -> Verdict | None:
    session = Session(Prepared(CONFIG, CONFIG, Device(torch.device("cpu"))), world, StopRequest())
    agreement = history = None
    try:
        session.choose_hasher()
        session.prepare()
        site.restart()  # the checks before training load samples and may run the model
        session.open_index_stream(session.data_seed)
        watch = LearningWatch(session.replica)
        trace = TraceWriter(None, world.num_replicas, algorithm=session.hasher.algorithm)
        agreement = session.compare(trace, None)
        history = session.keep_history()
        for event in session.steps(agreement, history):
            if isinstance(event, EpochDone):
                verdict = watch.settle(session.replica, world.channel, event.step, event.epoch)
                if verdict is not None:
                    return verdict
    except Concluded as end:
        return end.verdict
    except Divergence as divergence:
        return session.explainer().explain(divergence.verdict, agreement, history)
    return None


def _run_loop(site: Site, world: World) -> Verdict | None:
    seed_generators(42)
    training, validation = sites.make_samples()
    sites.build(site)
    if site.setting == "ddp":
        site.model = DistributedDataParallel(site.model, **site.memory.get("ddp", {}))
        site.reach("wrapped", step=0)
    batch: tuple[Tensor, Tensor] | None = None
    others = [each for each in (site.scheduler, site.scaler) if each is not None]
    agreement = None
    try:
        agreement = dreplica.Agreement(
            site.model,
            site.optimizer,
            others=others,
            channel=world.channel,
            quiet=True,
        )
        for step in range(1, STEPS + 1):
            indices = _indices(site, step)
            batch = _load(training, indices)
            if site.setting == "loop":
                agreement.keep_state()
            loss, logits = training_step(batch)
            if site.setting == "ddp":
                agreement.step()
                continue
            agreement.step(indices=indices, batch=batch, loss=loss, outputs=logits)
            if step % PER_EPOCH == 0:
                site.model.eval()
                images, _ = _load(validation, torch.arange(len(validation)))
                with torch.no_grad():
                    predictions = site.model(images)
                agreement.evaluation(predictions, batch=images)
                site.model.train()
        agreement.finish()
    except Divergence as divergence:
        return _explain(site, world, divergence.verdict, batch, others, agreement)
    return None


def _explain(
    site: Site,
    world: World,
    found: Verdict,
    batch: tuple[Tensor, Tensor] | None,
    others: list[object],
    agreement: dreplica.Agreement | None,
) -> Verdict:
    """Diagnose the step, as the verdict recommends, if there is one and the comparison has not named the cause."""
    if site.setting == "ddp" or not found.step or found.phase == "evaluation" or found.cause != "unexplained":
        return found
    named: dict[str, Any] = {"others": others, "found": found, "channel": world.channel}
    if "agreement" in inspect.signature(dreplica.diagnose).parameters:
        named["agreement"] = agreement
    return dreplica.diagnose(training_step, batch, site.model, site.optimizer, **named)


def _indices(site: Site, step: int) -> Tensor:
    """Return the indices of a step: the same on all replicas, in DDP other ones on each."""
    epoch, number = divmod(step - 1, PER_EPOCH)
    order = torch.randperm(TRAINING_SAMPLES, generator=torch.Generator().manual_seed(epoch))
    own = number + site.rank if site.setting == "ddp" else number
    indices = order.roll(-BATCH * own)[:BATCH]
    return site.reach("indices", indices, step)


def _load(samples: Samples, indices: Tensor) -> tuple[Tensor, Tensor]:
    rows = [samples[int(index)] for index in indices]
    return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
