"""Runs recent steps again, from the last agreed snapshot, through the same step function that took them."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.protocol import fold
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.evidence.provenance import Contents, contents_after, contents_before
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.diagnosis.tracing.output_sampler import OutputSampler
from dreplica.state.fingerprint.fingerprint import digest_bytes
from dreplica.state.replica import Replica
from dreplica.state.rng import set_rng_state
from dreplica.state.snapshot import Snapshot, restore_snapshot, take_snapshot
from dreplica.state.stages import Stage
from dreplica.training.history import EpochEntry, EvaluationEntry, History, StepEntry
from dreplica.training.step import training_step

Load = Callable[[Tensor, StepEntry], Batch]
"""Loads the samples of given indices as the training loop did for that step: in its epoch, augmented as they were."""


@dataclass(frozen=True)
class Replayed:
    """One more run of the step in question."""

    stages: dict[str, Stage]
    tracer: OpTracer
    contents: Contents
    generator: bytes
    """State of torch's CPU generator afterwards."""
    layout: bytes
    """16 bytes over how parameters, buffers and inputs lie in memory."""


class Repeats(Protocol):
    """Takes one step again and again on one replica; `close` puts back the state in which the replica was found."""

    def again(self, indices: Tensor, capture: int | None = None) -> Replayed:
        """Takes the step again, every operator recorded; with `capture`, that operator's tensors kept."""

    def replayed(self, stage: str, name: str) -> Tensor | None:
        """A tensor, on the CPU, as the replay just run left it."""

    def close(self) -> None:
        """Restores the state in which the replica was found."""


class Replayer:
    """Replays on one replica; no collective. `close` puts back the state in which the replica was found."""

    def __init__(
        self,
        replica: Replica,
        history: History,
        redraw: Callable[[StepEntry], Tensor],
        load: Load,
        config: TrainConfig,
        agreement: Agreement,
    ) -> None:
        assert history.snapshot is not None, "without a history there is nothing to replay"
        self._replica, self._history = replica, history
        self._redraw, self._load = redraw, load
        self._config, self._agreement = config, agreement
        self.present = take_snapshot(replica)
        self._before: Snapshot | None = None
        self._target: StepEntry | None = None

    def approach(self, step: int) -> int | None:
        """Runs from the snapshot up to just before `step`.

        Returns None, or the first step on the way whose state does not come out as it was compared: this replica does
        not reproduce itself even where it agreed with the others.
        """
        assert self._history.snapshot is not None
        restore_snapshot(self._replica, self._history.snapshot)
        for entry in self._history.entries:
            if isinstance(entry, EpochEntry):
                self._replica.advance_scheduler("epoch")
                continue
            if isinstance(entry, EvaluationEntry):
                entry.plain.restore()
                set_rng_state(entry.rng)
                continue
            if entry.number == 0:  # as the training loop does; what a step has changed since stays so
                self._replica.model.train()
            if entry.step == step:
                self._target = entry
                self._before = take_snapshot(self._replica)
                return None
            stages = self._take(self._load(entry.indices, entry))
            if entry.word is not None and fold(entry.step, stages) != entry.word.value:
                return entry.step
        raise AssertionError(f"step {step} is not in the history")

    def indices(self) -> Tensor:
        """The sample indices of the step in question as the coordinator drew them, whatever this replica received."""
        assert self._target is not None, "approach() comes first"
        return self._redraw(self._target)

    def again(self, indices: Tensor, capture: int | None = None, sampled: Collection[int] = ()) -> Replayed:
        """Takes the step in question again, every operator recorded; with `capture`, that operator's tensors kept, and
        with `sampled`, samples of those operators' results."""
        assert self._target is not None, "approach() comes first"
        assert self._before is not None
        restore_snapshot(self._replica, self._before)
        tracer = OpTracer(self._replica.optimizer, capture, self._replica.model)
        if sampled:
            tracer = OutputSampler(self._replica.optimizer, sampled, self._replica.model)
        batch = self._load(indices, self._target)
        before = contents_before(self._replica, batch)
        stages = self._take(batch, tracer)
        generator = torch.get_rng_state().numpy().tobytes()
        contents = Contents(before, contents_after(self._replica))
        return Replayed(stages, tracer, contents, generator, layout(self._replica.model, [batch.inputs]))

    @property
    def original_generator(self) -> bytes:
        """State of torch's CPU generator after the step in question, when it was first taken."""
        assert self._target is not None, "approach() comes first"
        return self._target.generator

    def replayed(self, stage: str, name: str) -> Tensor | None:
        """A tensor, on the CPU, as the replay just run left it."""
        tensor = take_snapshot(self._replica).find(stage, name)
        return None if tensor is None else tensor.cpu()

    def present_and_replayed(self, stage: str, name: str) -> tuple[Tensor, Tensor] | None:
        """A tensor as it was found and as the replay just run left it; None where a later step has overwritten it."""
        if self.present.steps_done != self._replica.steps_done:
            return None
        present, replayed = self.present.find(stage, name), self.replayed(stage, name)
        return None if present is None or replayed is None else (present.cpu(), replayed)

    def close(self) -> None:
        """Restores the state in which the replica was found, byte for byte."""
        restore_snapshot(self._replica, self.present)

    def _take(self, batch: Batch, tracer: OpTracer | None = None) -> dict[str, Stage]:
        with tracer or nullcontext():
            output = training_step(self._replica, batch, self._config)
        return self._agreement.observe(
            indices=batch.indices, batch=batch.tensors(), outputs=output.logits, loss=output.loss
        )


def layout(model: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """16 bytes over how parameters, buffers and inputs lie in memory."""
    named = [*model.named_parameters(), *model.named_buffers(), *(("inputs", tensor) for tensor in inputs)]
    strides = [(name, tensor.stride() if tensor.layout is torch.strided else None) for name, tensor in named]
    return digest_bytes("layout", repr(strides).encode())
