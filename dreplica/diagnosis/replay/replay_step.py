"""Repeated replay of a step of a custom training loop from one state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dreplica.agreement.agreement import Batch
from dreplica.agreement.subject import Subject
from dreplica.diagnosis.evidence.aftermath import Aftermath, plain_values, stage_tensors
from dreplica.diagnosis.evidence.provenance import DIGEST_BYTES, Contents, state_tensors
from dreplica.diagnosis.replay.own_values import DifferingValue, write_values
from dreplica.diagnosis.replay.replay_run import Replayed, layout
from dreplica.diagnosis.tracing.foreign_code import Foreign, collect_foreign
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.state.replica import LoopParts
from dreplica.state.snapshot import Snapshot, restore_snapshot, take_snapshot
from dreplica.state.stages import STAGES, Stage, batch_stage, make_stage
from dreplica.state.version_counters import VersionCounters

NO_INDICES = torch.empty(0, dtype=torch.int64)
"""Placeholder: the step is given its batch, so no samples are loaded."""


class StepExit(Exception):
    """The step function called `sys.exit`."""

    def __init__(self, code: Any) -> None:
        super().__init__(f"the step function called sys.exit({'' if code is None else repr(code)})")


class Repeated:
    """Repeated replay of a step on one replica; implements `Repeats`.

    Args:
        step: Function of the batch that runs the step.
        batch: The batch, of which each replay gets a copy.
        subject: Models and optimizers whose state is compared.

    Attributes:
        parts: The state that the step reads and writes.
        given: The batch as it was passed.
        batch: Digests of the batch, by stage.
        by_name: Set it to compare the entries of each stage in the order of their names, where replicas have the same
            ones in different orders.
        equal: Set it to values that every replay begins with, instead of this replica's own.
        before: The state that every replay begins with; None before `begin`.
        returned: The tensors that the last replay returned.
        writes: Steps of the version counters of tensors in the last replay, by name.
        present: Snapshot of the state from before the replays.
    """

    def __init__(self, step: Callable[[Any], Any], batch: Batch, subject: Subject) -> None:
        self.parts = LoopParts(subject.model, subject.optimizers, subject.others)
        self.batch = {"batch": batch_stage(batch)}
        self.by_name = False
        self.given = batch
        self.equal: Sequence[DifferingValue] = ()
        self.returned: list[Tensor] = []
        self.writes: dict[str, int] = {}
        self._step, self._subject = step, subject
        self._undo: list[Callable[[], None]] = []
        self.present = take_snapshot(self.parts)
        self.before: Snapshot | None = None

    def state(self) -> dict[str, Stage]:
        """Return the digests of the present state, by stage."""
        return {name: self._ordered(make_stage(entries)) for name, entries in self._subject.state().items()}

    def restore(self, before: Snapshot) -> None:
        """Restore the state that the step began with."""
        restore_snapshot(self.parts, before)

    def clear_gradients(self) -> None:
        """Remove the gradients, which are those of the step that has diverged."""
        for parameter in self.parts.model.parameters():
            parameter.grad = None

    def begin(self) -> None:
        """Take the present state as the start of every replay."""
        self.before = take_snapshot(self.parts)

    def again(self, indices: Tensor = NO_INDICES, capture: int | None = None) -> Replayed:
        """Replay the step.

        Args:
            indices: Not used.
            capture: Position of the operator whose tensors to capture. None to record every operator.
        """
        assert self.before is not None, "begin() comes first"
        self._restore(self.before)
        self._undo = write_values(self.parts, self.equal)
        batch = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, self.given)
        inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        state = [*state_tensors(self.parts), *inputs]
        tracer = OpTracer(self.parts.optimizers, capture, self._subject.given, generators=True, state=state)
        versions = VersionCounters(self.parts)
        with _gradients_used(self._subject) as gradients, tracer:
            returned = self._call(batch)
        self.writes = versions.steps()
        tracer.records = _with_turns(tracer.records)
        outputs = self.returned = [leaf.detach() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        made = self.state()
        made["gradients"] = self._ordered(_joined(gradients or [make_stage(self._subject.gradients())]))
        if outputs:
            made["output"] = batch_stage({f"returned.{number}": tensor for number, tensor in enumerate(outputs)})
        stages = {name: made[name] for name in STAGES if name in made}
        generator = torch.get_rng_state().numpy().tobytes()
        strides = layout(self.parts.model, inputs)
        foreign = collect_foreign(self.parts.model) if capture is None else Foreign()
        return Replayed(stages, tracer, _all_accounted(tracer), generator, strides, foreign=foreign)

    def _call(self, batch: Any) -> Any:
        try:
            return self._step(batch)
        except SystemExit as error:  # it would end this process, and the other replicas would wait for it
            raise StepExit(error.code) from error

    def _ordered(self, stage: Stage) -> Stage:
        if not self.by_name:
            return stage
        entries = sorted(stage.entries().items())
        return Stage(tuple(name for name, _ in entries), b"".join(digest for _, digest in entries), stage.num_bytes)

    def replayed(self, stage: str, name: str) -> Tensor | None:
        """Return a tensor as the last replay left it, on the CPU. None if there is no such tensor."""
        tensor = take_snapshot(self.parts).find(stage, name)
        return None if tensor is None else tensor.cpu()

    def aftermath(self, snapshot: Snapshot | None, writes: Mapping[str, int]) -> Aftermath:
        """Return what a run of the step has left.

        Args:
            snapshot: The state after it. None for the present state.
            writes: Steps of the version counters of tensors in it.
        """
        snapshot = snapshot or take_snapshot(self.parts)
        values, own = plain_values(self.parts, snapshot)
        return Aftermath(stage_tensors(snapshot), snapshot.rng, own, values, writes=writes)

    def close(self) -> None:
        """Restore the state from before the replays, byte for byte."""
        self._restore(self.present)

    def _restore(self, snapshot: Snapshot) -> None:
        for write in reversed(self._undo):
            write()
        self._undo = []
        restore_snapshot(self.parts, snapshot)


@contextmanager
def _gradients_used(subject: Subject) -> Iterator[list[Stage]]:
    """Collect gradients at the start of each optimizer's step, because the training step may clear them afterwards."""
    stages: list[Stage] = []

    def note(*_: Any) -> None:
        with _disable_current_modes():  # hashing must not be recorded among the step's operators
            stages.append(make_stage(subject.gradients()))

    handles = [optimizer.register_step_pre_hook(note) for optimizer in subject.optimizers.values()]
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()


def _joined(stages: Sequence[Stage]) -> Stage:
    """Join stages into one, with `weight` from the first and `weight#2` from the second."""
    numbered = enumerate(stages, start=1)
    names = (name if number == 1 else f"{name}#{number}" for number, stage in numbered for name in stage.names)
    return Stage(tuple(names), b"".join(stage.digests for stage in stages))


def _with_turns(records: Sequence[OpRecord]) -> list[OpRecord]:
    """Mark the records that precede a further forward or backward pass, as with several optimizers."""
    last = max((i for i, record in enumerate(records) if record.phase != "optimizer"), default=-1)
    before = max((i for i in range(last) if records[i].phase == "optimizer"), default=-1)
    return [replace(record, earlier=True) for record in records[: before + 1]] + list(records[before + 1 :])


def _all_accounted(tracer: OpTracer) -> Contents:
    """Return contents that account for every input of the step.

    A custom step may read any tensor, so an unknown input is no evidence of corrupted memory.
    """
    inputs = (record.inputs for record in tracer.records)
    digests = (row[at : at + DIGEST_BYTES] for row in inputs for at in range(0, len(row), DIGEST_BYTES))
    return Contents(frozenset(digests), {})
