"""Replays of recent steps of a run, from the last agreed snapshot and with the training loop's step function."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.protocol import fold
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.evidence.aftermath import Aftermath, plain_values, stage_tensors, writes_of
from dreplica.diagnosis.evidence.provenance import Contents, contents_after, contents_before, state_tensors
from dreplica.diagnosis.tracing.foreign_code import Foreign, collect_foreign
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.diagnosis.tracing.output_sampler import OutputSampler
from dreplica.state.fingerprint.fingerprint import digest_bytes
from dreplica.state.replica import Replica
from dreplica.state.rng import set_rng_state
from dreplica.state.snapshot import Snapshot, restore_snapshot, take_snapshot
from dreplica.state.stages import Stage
from dreplica.state.walk import MODEL, StateWalk
from dreplica.training.history import EpochEntry, EvaluationEntry, History, StepEntry
from dreplica.training.original import StepMeter
from dreplica.training.step import training_step

Load = Callable[[Tensor, StepEntry], Batch]
"""Function that loads samples by index as the training loop did for a step, with the same augmentation."""
Within = Callable[[nn.Module], AbstractContextManager[None]]
"""Makes a context for a replay, such as hooks on the model."""


@dataclass(frozen=True)
class Replayed:
    """One replay of the step in question."""

    stages: dict[str, Stage]
    """Digests of the state after the step."""
    tracer: OpTracer
    """Recorded operators, or the captured one."""
    contents: Contents
    """Digests of the tensors before and after the step."""
    generator: bytes
    """State of torch's CPU generator after the step."""
    layout: bytes
    """Digest of 16 bytes over the strides of parameters, buffers and inputs."""
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The sample indices that the replay used, on the CPU."""
    foreign: Foreign = field(default_factory=Foreign)
    """Code that replaces torch's own, of a replay that recorded every operator."""


class Repeats(Protocol):
    """Repeated replay of one step on one replica. `close` restores the state from before the replays."""

    def again(self, indices: Tensor, capture: int | None = None) -> Replayed:
        """Replay the step.

        Args:
            indices: Sample indices, shape (batch,), int64.
            capture: Position of the operator whose tensors to capture. None to record every operator.
        """

    def replayed(self, stage: str, name: str) -> Tensor | None:
        """Return a tensor as the last replay left it, on the CPU. None if there is no such tensor."""

    def close(self) -> None:
        """Restore the state from before the replays."""


class Replayer:
    """Replay of steps of a run on one replica. `close` restores the state from before the replays.

    No method is collective.

    Args:
        replica: The replica.
        history: The last agreed snapshot and the steps since.
        redraw: Returns the sample indices of a step as the coordinator drew them.
        load: Loads samples as the training loop did.
        config: Training settings.
        agreement: Computes the digests of a step.

    Attributes:
        present: Snapshot of the state from before the replays.
        follows_comparison: False if the step before the one in question was not compared, so that the original step may
            have begun with another state.
    """

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
        self._present_values = plain_values(replica, self.present)
        self._present_tensors = StateWalk(replica).tensors()
        self._before: Snapshot | None = None
        self._target: StepEntry | None = None
        self.follows_comparison = True

    def approach(self, step: int) -> int | None:
        """Restore the snapshot, and replay the steps before `step`.

        Returns:
            None, or the first step whose digest differs from the one compared during training. This replica then does
            not reproduce itself, even in a step in which it agreed with the others.
        """
        assert self._history.snapshot is not None
        restore_snapshot(self._replica, self._history.snapshot)
        compared = True
        for entry in self._history.entries:
            if isinstance(entry, EpochEntry):
                self._replica.advance_scheduler("epoch")
                continue
            if isinstance(entry, EvaluationEntry):
                entry.plain.restore()
                set_rng_state(entry.rng)
                continue
            if entry.number == 0:  # as the training loop does; a mode changed by a later step is kept
                self._replica.model.train()
            if entry.step == step:
                self._target = entry
                self.follows_comparison = compared
                self._before = take_snapshot(self._replica)
                return None
            stages = self._take(self._load(entry.indices, entry))
            compared = entry.word is not None
            if entry.word is not None and fold(entry.step, stages) != entry.word.value:
                return entry.step
        raise AssertionError(f"step {step} is not in the history")

    def indices(self) -> Tensor:
        """Return the step's sample indices as the coordinator drew them, which may differ from the received ones."""
        assert self._target is not None, "approach() comes first"
        return self._redraw(self._target)

    def again(self, indices: Tensor, capture: int | None = None, sampled: Collection[int] = ()) -> Replayed:
        """Replay the step in question.

        Args:
            indices: Sample indices, shape (batch,), int64.
            capture: Position of the operator whose tensors to capture. None to record every operator.
            sampled: Positions of operators whose results to sample, instead of recording.
        """
        assert self._target is not None, "approach() comes first"
        assert self._before is not None
        restore_snapshot(self._replica, self._before)
        batch = self._load(indices, self._target)
        state = [*state_tensors(self._replica), batch.inputs, batch.labels]
        tracer = OpTracer(self._replica.optimizer, capture, self._replica.model, generators=True, state=state)
        if sampled:
            tracer = OutputSampler(self._replica.optimizer, sampled, self._replica.model)
        before = contents_before(self._replica, batch)
        stages = self._take(batch, tracer)
        generator = torch.get_rng_state().numpy().tobytes()
        contents = Contents(before, contents_after(self._replica))
        strides = layout(self._replica.model, [batch.inputs])
        foreign = collect_foreign(self._replica.model) if capture is None and not sampled else Foreign()
        return Replayed(stages, tracer, contents, generator, strides, batch.indices.cpu(), foreign)

    def original(self) -> Aftermath:
        """Return what is known of the original step."""
        assert self._target is not None, "approach() comes first"
        tensors: dict[str, Mapping[str, Tensor]] = {}
        values: dict[str, Any] = {}
        generators: dict[str, Any] = {}
        if self.present.steps_done == self._target.step:  # otherwise a later step has overwritten its state
            tensors, (values, generators) = dict(stage_tensors(self.present)), self._present_values
        kept = self._history.originals.get(self._target.step)
        if kept is None:
            return Aftermath(tensors, values=values, own_generators=generators)
        tensors["output"] = kept.output.tensors()
        if kept.batch is not None:
            tensors |= {"indices": {"indices": kept.batch.indices}, "batch": kept.batch.tensors()}
        writes = writes_of(kept.footprint, self._present_tensors)
        return Aftermath(tensors, kept.generators, generators, values, kept.footprint.nodes, writes)

    def untraced(
        self, indices: Tensor, batch: Batch | None = None, within: Within | None = None
    ) -> tuple[dict[str, Stage], Aftermath]:
        """Replay the step as it ran: without a tracer.

        Args:
            indices: Sample indices, shape (batch,), int64.
            batch: Replaces the batch that is loaded.
            within: Given the model, makes the context that the step runs in.

        Returns:
            Digests of the state after the step, and the state.
        """
        assert self._target is not None, "approach() comes first"
        assert self._before is not None
        restore_snapshot(self._replica, self._before)
        loaded = self._load(indices, self._target)
        batch = loaded if batch is None else batch
        meter = StepMeter(self._replica)
        with nullcontext() if within is None else within(self._replica.model):
            meter.start(batch)
            output = training_step(self._replica, batch, self._config)
            footprint = meter.stop(batch, output)
        stages = self._agreement.observe(
            indices=batch.indices, batch=batch.tensors(), outputs=output.logits, loss=output.loss
        )
        snapshot = take_snapshot(self._replica)
        tensors: dict[str, Mapping[str, Tensor]] = {"output": output.tensors(), "batch": batch.tensors()}
        tensors |= {"indices": {"indices": batch.indices}, **stage_tensors(snapshot)}
        values, own = plain_values(self._replica, snapshot)
        writes = writes_of(footprint, StateWalk(self._replica).tensors())
        return stages, Aftermath(tensors, self._agreement.generator_states, own, values, footprint.nodes, writes)

    def optimize(self, gradients: Mapping[str, Tensor], changed: str | None = None) -> Aftermath:
        """Run only the optimizer's step and the scheduler's, from the state before the step in question.

        Args:
            gradients: Gradients by name, as in the stage `gradients`.
            changed: Name of a weight whose first element is changed before, to see what that reaches.

        Returns:
            The state after it.
        """
        assert self._before is not None, "approach() comes first"
        restore_snapshot(self._replica, self._before)
        for name, parameter in StateWalk(self._replica).parameters().items():
            name = name.removeprefix(f"{MODEL}.")
            parameter.grad = gradients[name].clone() if name in gradients else None
            if name == changed:
                parameter.data[(0,) * parameter.dim()] += 1
        self._replica.optimizer.step()
        self._replica.advance_scheduler("step")
        return Aftermath(stage_tensors(take_snapshot(self._replica)))

    def digests(self) -> dict[str, Stage]:
        """Return the digests of the replica's present state."""
        return self._agreement.observe()

    def before(self) -> Aftermath:
        """Return the state before the step in question."""
        assert self._before is not None, "approach() comes first"
        return Aftermath(stage_tensors(self._before))

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The replica's scaler, which skips steps with infinite gradients."""
        return self._replica.scaler

    def replayed(self, stage: str, name: str) -> Tensor | None:
        """Return a tensor as the last replay left it, on the CPU. None if there is no such tensor."""
        tensor = take_snapshot(self._replica).find(stage, name)
        return None if tensor is None else tensor.cpu()

    def close(self) -> None:
        """Restore the state from before the replays, byte for byte."""
        restore_snapshot(self._replica, self.present)

    def _take(self, batch: Batch, tracer: OpTracer | None = None) -> dict[str, Stage]:
        with tracer or nullcontext():
            output = training_step(self._replica, batch, self._config)
        return self._agreement.observe(
            indices=batch.indices, batch=batch.tensors(), outputs=output.logits, loss=output.loss
        )


def layout(model: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """Return a digest of 16 bytes over the strides of parameters, buffers and inputs."""
    named = [*model.named_parameters(), *model.named_buffers(), *(("inputs", tensor) for tensor in inputs)]
    strides = [(name, tensor.stride() if tensor.layout is torch.strided else None) for name, tensor in named]
    return digest_bytes("layout", repr(sorted(strides, key=itemgetter(0))).encode())
