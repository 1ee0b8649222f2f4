"""`Agreement`: after every step of any loop, are all replicas still bit for bit the same?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dreplica.agreement import protocol
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
from dreplica.agreement.verdict import Divergence, Verdict, suspects_of
from dreplica.section import Lockstep, Section
from dreplica.world.channel import Channel, Posted, gloo_channel

Batch = Tensor | Mapping[str, Any] | Sequence[Any]

INDEPENDENT_STAGES = ("indices", "batch")
"""What replicas from distinct seeds still share."""

_CAUSE_OF_STAGE = {"indices": "indices-differ", "batch": "batch-differs", "predictions": "evaluation-differs"}


class AgreementConfig(Section):
    """What is compared, how often, and what happens when it differs."""

    every: Annotated[int, Lockstep()] = Field(1, ge=0)
    """Compare every so many steps; 0: never."""
    expect: Annotated[Literal["auto", "identical", "independent"], Lockstep()] = "auto"
    """`identical`: all state must be equal; `independent`: indices and batches must be, states need not; `auto`:
    identical unless `seed.model` gives replicas distinct seeds."""
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
        expect: "identical": every stage must agree; "independent": only `indices` and `batch`.
        every: compare every so many steps; 0: only count them.
        on_divergence: "stop" raises, "continue" records.
        lag: 0 compares at the step itself; 1 completes the comparison during the next step, so that replicas need not
            wait for each other at every step. The verdict names the exact step either way.
        trace: where each checked step is recorded.
        channel: how replicas talk; by default gloo over the default process group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        others: Sequence[Any] = (),
        expect: Literal["identical", "independent"] = "identical",
        every: int = 1,
        on_divergence: Literal["stop", "continue"] = "stop",
        lag: Literal[0, 1] = 0,
        trace: Trace | None = None,
        channel: Channel | None = None,
    ) -> None:
        self.steps_done = 0
        self.steps_checked = 0
        self.divergence: Verdict | None = None
        self._model = model
        self._optimizer = optimizer
        self._others = tuple(others)
        self._expect = expect
        self._every = every
        self._on_divergence = on_divergence
        self._lag = lag
        self._channel = channel or gloo_channel()
        self._trace = trace or Trace(None, self._channel.size)
        self._pending: _Pending | None = None
        self._stop = False
        self._last_checked = -1
        self.build = self._build_stages()
        if every:
            self._check(0, None, self.build)

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
            stop: this replica wants to stop.

        Returns whether any replica wanted to stop, as of the newest completed comparison: the same on all replicas.
        """
        self.steps_done += 1
        if self._every and self.steps_done % self._every == 0:
            stages = self._step_stages(indices, batch, {"logits": outputs, "loss": loss})
            self._check(self.steps_done, epoch, stages, stop)
        return self._stop

    def evaluation(self, predictions: Mapping[str, Tensor], epoch: int | None = None) -> None:
        """Compares the predictions of an evaluation: a stage of the step it follows."""
        self._complete()
        if self._every and self._expect == "identical":
            self._check(self.steps_done, epoch, {"predictions": tensors_stage(predictions)}, lag=0)

    def finish(self) -> None:
        """Completes what is under way and, where the last step was not compared, compares the final state."""
        self._complete()
        if self._last_checked < self.steps_done and self._expect == "identical":
            self._check(self.steps_done, None, self._state_stages(), lag=0)

    def fingerprints(self) -> list[dict[str, str]]:
        """The digest of the weights, buffers and optimizer of every replica, 32 hex digits each. A collective."""
        stages = self._state_stages()
        chosen = {name: stages[name].digest.hex() for name in ("weights", "buffers", "optimizer") if name in stages}
        return self._channel.gather(chosen)

    def _check(
        self, step: int, epoch: int | None, stages: dict[str, Stage], stop: bool = False, lag: int | None = None
    ) -> None:
        self._complete()
        posted = protocol.post(self._channel, protocol.fold(step, stages), stop)
        self._pending = _Pending(step, epoch, stages, posted)
        if step == 0 or not (self._lag if lag is None else lag):
            self._complete()

    def _complete(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        outcome = protocol.read(self._channel, pending.posted)
        self._stop = self._stop or outcome.stop
        self._last_checked = pending.step
        if pending.step > 0 and "predictions" not in pending.stages:
            self.steps_checked += 1
        self._trace.step(pending.step, pending.epoch, outcome.agreed, pending.stages)
        if not outcome.agreed and self.divergence is None:
            place = protocol.locate(self._channel, pending.stages)
            self.divergence = describe(place, pending.step, pending.epoch, self._channel.size)
            if self._on_divergence == "stop":
                raise Divergence(self.divergence)

    def _build_stages(self) -> dict[str, Stage]:
        if self._expect == "independent":
            return {}
        return {"buffers": buffers_stage(self._model), "weights": weights_stage(self._model), "rng": rng_stage()}

    def _step_stages(
        self, indices: Tensor | None, batch: Batch | None, output: Mapping[str, Tensor | None]
    ) -> dict[str, Stage]:
        stages: dict[str, Stage] = {}
        if indices is not None:
            stages["indices"] = tensors_stage({"indices": indices})
        if batch is not None:
            stages["batch"] = batch_stage(batch)
        if self._expect == "identical":
            present = {name: tensor for name, tensor in output.items() if tensor is not None}
            if present:
                stages["output"] = tensors_stage(present)
            stages["gradients"] = gradients_stage(self._model)
            stages |= self._state_stages()
        return {name: stages[name] for name in STAGES if name in stages}

    def _state_stages(self) -> dict[str, Stage]:
        stages = {"buffers": buffers_stage(self._model)}
        if self._optimizer is not None:
            stages["optimizer"] = optimizer_stage(self._model, self._optimizer, *self._others)
        return stages | {"weights": weights_stage(self._model), "rng": rng_stage()}


def describe(place: protocol.Place, step: int, epoch: int | None, num_replicas: int) -> Verdict:
    """The verdict as far as the comparison alone can tell: where, and who; the cause only where the stage says it."""
    where = f"{place.stage}, {place.tensor}" if place.tensor else place.stage
    when = "at the build (step 0)" if step == 0 else f"at step {step}"
    suspects = suspects_of(place.classes)
    evidence = [
        f"{place.num_differing} of {place.num_entries} entries of {place.stage} differ, first {place.tensor}",
        f"differing stages: {', '.join(place.differing_stages)}",
    ]
    if place.only_on:
        some = [f"{name} only on replicas {ids}" for name, ids in list(place.only_on.items())[:5]]
        evidence.append(f"{len(place.only_on)} entries exist on some replicas only: {'; '.join(some)}")
    if not suspects:
        evidence.append(f"{num_replicas} replicas without a majority: the comparison alone cannot say who is wrong")
    return Verdict(
        agreed=False,
        cause="structure-differs" if place.only_on else _CAUSE_OF_STAGE.get(place.stage, "unexplained"),
        summary=f"replicas parted {when}: {where}; classes {place.classes}",
        step=step,
        epoch=epoch,
        stage=place.stage,
        tensor=place.tensor,
        module=_module_of(place.stage, place.tensor),
        suspects=suspects,
        classes=place.classes,
        evidence=evidence,
    )


def _module_of(stage: str, tensor: str | None) -> str | None:
    """The module path that a parameter's or buffer's name begins with."""
    if tensor is None or stage not in {"weights", "gradients", "buffers"} or "." not in tensor:
        return None
    return tensor.rpartition(".")[0]
