"""`Agreement`: after every step of any loop, are all replicas still bit for bit the same?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreplica.agreement import protocol
from dreplica.agreement.place import describe
from dreplica.agreement.stages import (
    STAGES,
    Stage,
    batch_stage,
    buffers_stage,
    gradients_stage,
    optimizer_stage,
    rng_stage,
    tensors_stage,
    weights_stage,
)
from dreplica.agreement.trace import Trace
from dreplica.agreement.verdict import Divergence, Verdict
from dreplica.section import Lockstep, Section, nearest
from dreplica.world.channel import Channel, Posted, gloo_channel

Batch = Tensor | Mapping[str, Any] | Sequence[Any]

INDEPENDENT_STAGES = ("indices", "batch")
"""What replicas from distinct seeds still share."""


class AgreementConfig(Section):
    """What is compared, how often, and what happens when it differs."""

    every: Annotated[int, Lockstep()] = Field(1, ge=0)
    """Compare every so many steps; 0: never."""
    expect: Annotated[Literal["auto", "identical", "independent"], Lockstep()] = "auto"
    """`identical`: all state must be equal; `independent`: indices and batches must be, states need not; `auto`:
    identical unless `seed.model` gives replicas distinct seeds."""
    snapshot_every: Annotated[int, Lockstep()] = Field(50, ge=0)
    """Steps between snapshots kept in memory, from which a divergence is replayed; 0: no snapshots, no replay."""
    on_divergence: Annotated[Literal["stop", "continue"], Lockstep()] = "stop"
    """`stop` at the first difference, or `continue` and only record it."""


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int | None
    stages: dict[str, Stage]
    posted: Posted


class Agreement:
    """Compares the state of all replicas of a process group after every step, bit for bit.

    ::

        agreement = dreplica.Agreement(model, optimizer)
        for inputs, labels in loader:
            ...
            optimizer.step()
            agreement.step(batch=(inputs, labels), loss=loss)
        agreement.finish()

    Creating it compares the build (step 0). Creating it, `step`, `evaluation` and `finish` are collectives: every
    replica calls them in the same order. Each raises `Divergence`, which carries the verdict, unless `on_divergence`
    is "continue"; then `divergence` holds the first verdict. `ReplicaLost` is raised when a replica is gone.

    Args:
        model: its parameters, buffers and gradients are compared.
        optimizer: its settings and state are compared; None if there is none.
        others: further objects with a `state_dict` that belong to the optimizer stage: scheduler, GradScaler.
        expect: "identical": every one of `stages` must agree; "independent": only `indices` and `batch`.
        stages: what is compared; by default all there is. Under DDP, where every rank has a batch of its own:
            `("gradients", "optimizer", "weights")`. ValueError for a name that is no stage.
        every: compare every so many steps; 0: only count them.
        on_divergence: "stop" raises, "continue" records.
        lag: 0 compares at the step itself; 1 completes the comparison during the next step, so that replicas need not
            wait for each other at every step. The verdict names the exact step either way.
        trace: where each checked step is recorded.
        channel: how replicas talk; by default gloo over the default process group.

    Attributes:
        divergence: the verdict of the first difference; None while there is none.
        steps_done: how often `step` was called.
        steps_checked: how many steps were compared.
        bytes_per_step: bytes of tensors that this replica hashed in the newest compared step; 0 before the first.
        agreed_until: the newest step whose state all replicas are known to have agreed on; -1 before the build's.
        last_word: `protocol.fold` of what this replica compared last; None after a step that is not compared.
        diverged_stages: this replica's stages at the first difference.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        others: Sequence[Any] = (),
        expect: Literal["identical", "independent"] = "identical",
        stages: Collection[str] = STAGES,
        every: int = 1,
        on_divergence: Literal["stop", "continue"] = "stop",
        lag: Literal[0, 1] = 0,
        trace: Trace | None = None,
        channel: Channel | None = None,
    ) -> None:
        self.steps_done = 0
        self.steps_checked = 0
        self.bytes_per_step = 0
        self.agreed_until = -1
        self.last_word: bytes | None = None
        self.divergence: Verdict | None = None
        self.diverged_stages: dict[str, Stage] = {}
        self._model = model
        self._optimizer = optimizer
        self._others = tuple(others)
        self._compared = _checked_names(stages if expect == "identical" else INDEPENDENT_STAGES)
        self._every = every
        self._on_divergence = on_divergence
        self._lag = lag
        self._channel = channel or gloo_channel()
        self._trace = trace or Trace(None, self._channel.size)
        self._pending: _Pending | None = None
        self._wants_stop = False
        self._stop = False
        self._last_checked = -1
        if every:
            build = self._state()
            build.pop("optimizer", None)  # it has no state yet, and its settings are compared at step 1
            self._check(0, None, self._make(build))

    def step(
        self,
        *,
        batch: Batch | None = None,
        loss: Tensor | None = None,
        outputs: Tensor | None = None,
        indices: Tensor | None = None,
        epoch: int | None = None,
        stop: bool = False,
    ) -> bool:
        """Compares the state after a training step; call it after `optimizer.step()`.

        Args:
            batch: what reached the model: a tensor, or tensors in dicts, lists and tuples.
            loss: the loss, 0-dim.
            outputs: the model's output.
            indices: the samples' indices, int64.
            epoch: for the record.
            stop: this replica wants to stop, from now on.

        Returns whether any replica wanted to stop, as of the newest completed comparison: the same on all replicas.
        With `every` 0 nothing is exchanged, so nobody learns of it and the answer is always False.
        """
        self.steps_done += 1
        self._wants_stop = self._wants_stop or stop
        self.last_word = None
        if self._every and self.steps_done % self._every == 0:
            stages = self.observe(indices=indices, batch=batch, outputs=outputs, loss=loss)
            self.bytes_per_step = sum(stage.num_bytes for stage in stages.values())
            self._check(self.steps_done, epoch, stages)
        return self._stop

    def evaluation(self, predictions: Mapping[str, Tensor], epoch: int | None = None) -> None:
        """Compares the predictions of an evaluation: a stage of the step it follows."""
        self._complete()
        if self._every and "predictions" in self._compared:
            self._check(self.steps_done, epoch, {"predictions": tensors_stage(predictions)}, lag=0)

    def finish(self) -> None:
        """Completes what is under way and, where the last step was not compared, compares the final state."""
        self._complete()
        state = self._state()
        if self._last_checked < self.steps_done and self._compared & state.keys():
            self._check(self.steps_done, None, self._make(state), lag=0)

    def fingerprints(self) -> list[dict[str, str]]:
        """The digest of the weights, buffers and optimizer of every replica, 32 hex digits each. A collective."""
        state = self._state()
        return self._channel.gather(
            {name: state[name]().digest.hex() for name in ("weights", "buffers", "optimizer") if name in state}
        )

    def _check(self, step: int, epoch: int | None, stages: dict[str, Stage], lag: int | None = None) -> None:
        self._complete()
        self.last_word = protocol.fold(step, stages)
        posted = protocol.post(self._channel, self.last_word, self._wants_stop)
        self._pending = _Pending(step, epoch, stages, posted)
        if step == 0 or not (self._lag if lag is None else lag):
            self._complete()

    def _complete(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        outcome = protocol.read(self._channel, pending.posted)
        self._stop = self._stop or outcome.stop
        if "predictions" not in pending.stages:
            self._last_checked = pending.step
            if pending.step > 0:
                self.steps_checked += 1
            if outcome.agreed and self.divergence is None:
                self.agreed_until = pending.step
        self._trace.step(pending.step, pending.epoch, outcome.agreed, pending.stages)
        if not outcome.agreed and self.divergence is None:
            self.diverged_stages = pending.stages
            place = protocol.locate(self._channel, pending.step, pending.stages)
            self.divergence = describe(place, pending.epoch, self._channel.size)
            if self._on_divergence == "stop":
                raise Divergence(self.divergence)

    def observe(
        self,
        *,
        indices: Tensor | None = None,
        batch: Batch | None = None,
        outputs: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> dict[str, Stage]:
        """This replica's stages as they are now, without comparing them; arguments as in `step`."""
        output = {name: tensor for name, tensor in (("logits", outputs), ("loss", loss)) if tensor is not None}
        makers = {"gradients": lambda: gradients_stage(self._model)} | self._state()
        if indices is not None:
            makers["indices"] = lambda: tensors_stage({"indices": indices})
        if batch is not None:
            makers["batch"] = lambda: batch_stage(batch)
        if output:
            makers["output"] = lambda: tensors_stage(output)
        return self._make(makers)

    def _make(self, makers: Mapping[str, Callable[[], Stage]]) -> dict[str, Stage]:
        """Those of the stages that are compared, in causal order."""
        return {name: makers[name]() for name in STAGES if name in makers and name in self._compared}

    def _state(self) -> dict[str, Callable[[], Stage]]:
        """How to make the stages that exist at any time."""
        model, optimizer = self._model, self._optimizer
        state = {"buffers": lambda: buffers_stage(model), "weights": lambda: weights_stage(model), "rng": rng_stage}
        if optimizer is not None:
            state["optimizer"] = lambda: optimizer_stage(model, optimizer, *self._others)
        return state


def _checked_names(stages: Collection[str]) -> frozenset[str]:
    """Raises ValueError for a name that is no stage."""
    for name in stages:
        if name not in STAGES:
            raise ValueError(f"stages: {name!r} is no stage. {nearest(name, STAGES)}")
    return frozenset(stages)
