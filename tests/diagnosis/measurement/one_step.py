"""One replica whose code acts once, in its third step, and the findings on that step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.protocol import CombinedDigest, fold
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.decision.rules import name_cause
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.measurement.original_step import examine_original
from dreplica.diagnosis.replay.replay_run import Replayer
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.state.stages import STAGES
from dreplica.training.history import History, StepEntry
from dreplica.training.original import Original
from dreplica.training.step import training_step
from tests.fixtures import tiny_model

AT = 3
"""The step in which code acts once."""

Act = Callable[[Replica, Tensor], Tensor | None]
"""Acts at the start of the forward pass. May return other inputs of the model."""


class Acting(nn.Module):
    """A model that calls a function at the start of the forward pass.

    Args:
        body: The model.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.act: Callable[[Tensor], Tensor | None] = _nothing

    def forward(self, images: Tensor) -> Tensor:
        changed = self.act(images)
        return self.body(images if changed is None else changed)


def _nothing(_images: Tensor) -> None:
    return None


def with_sgd(model: nn.Module) -> Replica:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Replica(model, nn.CrossEntropyLoss(), optimizer)


def load(indices: Tensor, _entry: StepEntry) -> Batch:
    generator = torch.Generator().manual_seed(100 + int(indices[0]))
    return Batch(indices, torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5)


def findings_on(
    act: Act | None = None,
    after: Callable[[Replica], None] | None = None,
    build: Callable[[nn.Module], Replica] = with_sgd,
    body: Callable[[], nn.Module] = lambda: tiny_model(5),
    config: TrainConfig = TrainConfig(),  # noqa: B008  # immutable
    at: int = AT,
) -> tuple[list[Finding], list[str]]:
    """Train for some steps, act once in the last of them, and examine it.

    Args:
        act: Acts once, at the start of the forward pass of step `at`.
        after: Acts once, between the optimizer's step and the comparison of step `at`.
        build: Makes the replica of a model.
        body: Makes the model.
        config: Training settings.
        at: The step.

    Returns:
        The findings, and the stages in which the step differs from its replay.
    """
    seed_generators(3)
    model = Acting(body())
    replica = build(model)
    agreement = Agreement(replica.model, replica.optimizer, others=replica.others, all_generators=True, quiet=True)
    history = History(replica, 50)
    stages: dict[str, Any] = {}
    for step in range(1, at + 1):
        entry = StepEntry(step, 1, step - 1, torch.arange(8) + 8 * step, None)
        batch = load(entry.indices, entry)
        done: list[int] = []

        def acts(images: Tensor, done: list[int] = done) -> Tensor | None:
            done.append(1)
            return act(replica, images) if act is not None and len(done) == 1 else None

        if step == at:
            model.act = acts
        assert history.meter is not None
        history.meter.start(batch)
        output = training_step(replica, batch, config)
        footprint = history.meter.stop(batch, output)
        model.act = _nothing
        if step == at and after is not None:
            after(replica)
        stages = agreement.observe(
            indices=batch.indices, batch=batch.tensors(), outputs=output.logits, loss=output.loss
        )
        entry = replace(entry, word=CombinedDigest(partial(fold, step, stages)))
        history.step(entry, step - 1, Original(batch, output, agreement.generator_states, footprint))
    replayer = Replayer(replica, history, lambda entry: entry.indices, load, config, agreement)
    assert replayer.approach(at) is None
    again = replayer.again(replayer.indices())
    differing = [name for name in STAGES if name in stages and stages[name].digest != again.stages[name].digest]
    stage = differing[0] if differing else None
    found = examine_original(replayer, replayer.indices(), stages, again.tracer.records, stage, 0)
    replayer.close()
    return found, differing


def kinds_of(findings: Sequence[Finding]) -> set[Kind]:
    return {finding.kind for finding in findings}


def cause_of(findings: Sequence[Finding]) -> str:
    """Return the cause that the rules name if all replays agree and the original step differs."""
    return name_cause({*kinds_of(findings), Kind.REPLAYS_AGREE, Kind.ORIGINAL_DIFFERS})
