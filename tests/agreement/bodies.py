"""A small training loop that passes everything to `Agreement`, with faults injected on request."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.process_group import World
from tests.state.fingerprint.late import LateHasher
from tests.trace_rows import read_rows


@dataclass(frozen=True)
class Fault:
    """A bit of a stage's `TENSOR` flipped on some replicas at a step (`rng`: one number drawn)."""

    replicas: tuple[int, ...]
    step: int
    stage: str


TENSOR = {
    "indices": "indices",
    "batch": "labels",
    "buffers": "1.running_mean",
    "output": "loss",
    "gradients": "5.weight",
    "optimizer": "0.weight.momentum_buffer",
    "weights": "5.bias",
    "rng": "torch.cpu",
    "predictions": "logits",
}
"""The entry of each stage that a fault corrupts: the first one that differs."""


@dataclass(frozen=True)
class Job:
    """A run of `train`."""

    faults: tuple[Fault, ...] = ()
    steps: int = 4
    every: int = 1
    lag: Any = 0
    expect: Any = "identical"
    on_divergence: Any = "stop"
    seed: int = 0
    distinct: bool = False
    """True to seed each replica differently."""
    evaluate_after: int | None = None
    stop_at: tuple[int, int] | None = None
    """The replica that wants to stop, and the step."""
    trace: str | None = None
    """Folder for the trace of every replica, or None."""
    late: tuple[int, ...] = ()
    """Replicas whose digests are computed asynchronously, as on a GPU."""


@dataclass(frozen=True)
class Result:
    """Result of one replica's run."""

    verdict: Verdict | None
    raised: bool
    steps_done: int
    """Number of steps taken; -1 if the run ended at the build."""
    steps_checked: int
    stops: list[bool]
    """The return value of each step."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """The lines of this replica's trace."""


def tiny_model() -> nn.Module:
    """Return a model from (batch, 1, 4, 4) to (batch, 3)."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def flip_bit(tensor: Tensor) -> None:
    """Flip the lowest bit of the last element, in place."""
    data = tensor.data  # unlike `detach`, unseen by autograd, as a fault is
    data.view(-1).view(torch.uint8)[-tensor.dtype.itemsize] ^= 1


def train_all(world: World, jobs: Sequence[Job]) -> list[Result]:
    """Run all jobs in the same processes, which is much cheaper than starting processes for each."""
    return [train(world, job) for job in jobs]


def train(world: World, job: Job) -> Result:
    """Train a tiny model with BatchNorm and dropout."""
    seed_everything(job.seed + (world.replica_id if job.distinct else 0))
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def plant(step: int, stage: str, tensor: Tensor | None) -> None:
        if any(
            world.replica_id in fault.replicas and (fault.step, fault.stage) == (step, stage) for fault in job.faults
        ):
            torch.rand(()) if tensor is None else flip_bit(tensor)

    plant(0, "weights", model[5].bias)
    path = None if job.trace is None else Path(job.trace) / f"{world.replica_id}.jsonl"
    hasher = LateHasher() if world.replica_id in job.late else Hasher()
    agreement, stops, raised = None, [], False
    with TraceWriter(path, world.num_replicas, algorithm=hasher.algorithm) as trace:
        try:
            agreement = Agreement(
                model,
                optimizer,
                every=job.every,
                lag=job.lag,
                expect=job.expect,
                on_divergence=job.on_divergence,
                trace=trace,
                channel=world.channel,
                hasher=hasher,
                quiet=True,
            )
            for step in range(1, job.steps + 1):
                generator = torch.Generator().manual_seed(1000 + step)
                indices = torch.randint(100, (6,), generator=generator)
                inputs, labels = torch.randn(6, 1, 4, 4, generator=generator), indices % 3
                plant(step, "indices", indices)
                used = labels.clone()
                plant(step, "batch", labels)
                optimizer.zero_grad()
                logits = model(inputs)
                plant(step, "buffers", model[1].running_mean)
                loss = nn.functional.cross_entropy(logits, used)
                loss.backward()
                plant(step, "output", loss)
                plant(step, "gradients", model[5].weight.grad)
                optimizer.step()
                plant(step, "optimizer", optimizer.state[model[0].weight]["momentum_buffer"])
                plant(step, "weights", model[5].bias)
                plant(step, "rng", None)
                stop = job.stop_at == (world.replica_id, step)
                stops.append(
                    agreement.step(
                        indices=indices, batch=(inputs, labels), outputs=logits, loss=loss, epoch=1, stop=stop
                    )
                )
                if job.evaluate_after == step:
                    with torch.no_grad():
                        predictions = model.eval()(torch.ones(2, 1, 4, 4))
                    model.train()
                    plant(step, "predictions", predictions)
                    agreement.evaluation({"logits": predictions}, epoch=1)
            agreement.finish()
        except Divergence as divergence:
            raised = True
            verdict = divergence.verdict
        else:
            verdict = agreement.divergence
    lines = [] if path is None else read_rows(path)
    if agreement is None:
        return Result(verdict, raised, -1, 0, stops, lines)
    return Result(verdict, raised, agreement.steps_done, agreement.steps_checked, stops, lines)
