"""`Agreement`: after every step of any loop, are all replicas still bit for bit the same?"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from dreplica.agreement import protocol
from dreplica.agreement.exchange import Exchange
from dreplica.agreement.hasher import Hasher, Observation, hasher_for
from dreplica.agreement.reference import Apart, Reference, ReferenceDiffers
from dreplica.agreement.subject import Batch, Expect, Models, Subject
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.channel import Channel, gloo_channel
from dreplica.state.stages import STAGES, Entry, Optimizers, Stage, batch_entries, make_stage

log = logging.getLogger(__name__)

_GIVEN = frozenset({"indices", "batch", "output"})
"""Stages that `step` has from its arguments alone."""


class Agreement:
    """Compares the state of all replicas of a process group after every step, bit for bit.

    ::

        agreement = dreplica.Agreement(model, optimizer)
        for inputs, labels in loader:
            ...
            optimizer.step()
            agreement.step(batch=(inputs, labels), loss=loss)
        agreement.finish()

    Creating it compares the build (step 0), generators included: seed Python's, NumPy's and torch's alike before.
    Creating it, `step`, `complete`, `evaluation` and `finish` are collectives: every replica calls them in the same
    order. Each raises `Divergence`, which carries the verdict, unless `on_divergence` is "continue"; then `divergence`
    holds the first verdict. `ReplicaLost` is raised when a replica is gone, ValueError for an argument that is none of
    the below.

    Args:
        model: its parameters, buffers and gradients are compared; several by name: `{"generator": g, "critic": c}`.
            Tensors have the names they have in the model itself, without DistributedDataParallel and `torch.compile`.
        optimizer: its settings and state are compared; several by name, or None if there is none.
        others: further objects with a `state_dict` that belong to the optimizer stage: scheduler, GradScaler.
        expect: "identical": every one of `stages` must agree; "independent": only `indices` and `batch`; "ddp", where
            every rank has a batch of its own and gradients are averaged: `gradients`, `optimizer` and `weights`, and
            `buffers` unless DistributedDataParallel broadcasts them before each forward pass (`broadcast_buffers`, its
            default). By default "ddp" if a model is in DistributedDataParallel, otherwise "identical".
        stages: what is compared; by default all that must agree.
        every: compare every so many steps; 0: only count them.
        on_divergence: "stop" raises, "continue" records.
        lag: 0 compares at the step itself; 1 completes the comparison during the next step, so that replicas need not
            wait for each other at every step. The verdict names the exact step either way.
        trace: where each checked step is recorded.
        reference: a recorded run, on rank 0: what replicas agree on is compared with it, and the first difference is
            a divergence, too (`ReferenceDiffers`).
        stoppable: exchange at every step, compared or not, whether a replica wants to stop; otherwise only where
            something is compared.
        steps_done: of a run that goes on: how many steps it had taken. Its state is compared as it is now, in place of
            the build's.
        channel: how replicas talk; by default a gloo group of its own.
        hasher: takes the fingerprints, on all replicas alike; by default those of tensors on an NVIDIA GPU there. With
            `lag` 1 the GPU is then waited for only as far as the step before.

    Attributes:
        hasher: takes the fingerprints.
        divergence: the verdict of the first difference; None while there is none.
        steps_done: how often `step` was called.
        steps_checked: how many steps were compared.
        stages_compared: of all comparisons together, how many stages.
        bytes_per_step: bytes of tensors that this replica hashed in the newest compared step; 0 before the first.
        bytes_hashed: bytes of tensors that this replica has hashed to compare them, in all.
        agreed_until: the newest step whose state all replicas are known to have agreed on; -1 before the build's.
        last_word: stands for what this replica compared last; None after a step that is not compared.
        diverged_stages: this replica's stages at the first difference.
        apart: that difference, if it is one from the reference: the same on all replicas.
    """

    def __init__(
        self,
        model: Models,
        optimizer: Optimizers = None,
        *,
        others: Sequence[Any] = (),
        expect: Expect | None = None,
        stages: Collection[str] | None = None,
        every: int = 1,
        on_divergence: Literal["stop", "continue"] = "stop",
        lag: Literal[0, 1] = 0,
        trace: TraceWriter | None = None,
        reference: Reference | None = None,
        channel: Channel | None = None,
        steps_done: int = 0,
        stoppable: bool = False,
        hasher: Hasher | None = None,
    ) -> None:
        if expect is not None:
            _check_choice("expect", expect, ("identical", "independent", "ddp"))
        _check_choice("on_divergence", on_divergence, ("stop", "continue"))
        _check_choice("lag", lag, (0, 1))
        if not isinstance(every, int) or every < 0:
            raise ValueError(f"every: {every!r} will not do: give a number of steps, or 0 for never.")
        if not isinstance(trace, TraceWriter | None):
            raise ValueError(
                f"trace: {trace!r} will not do: give a dreplica.agreement.trace.writer.TraceWriter, or leave it out."
            )
        self.steps_done = self._began_after = steps_done
        self.steps_checked = 0
        self.stages_compared = 0
        self.bytes_per_step = 0
        self.bytes_hashed = 0
        self.agreed_until = -1
        self.last_word: protocol.Word | None = None
        self.divergence: Verdict | None = None
        self.diverged_stages: dict[str, Stage] = {}
        self.apart: Apart | None = None
        self._subject = Subject(model, optimizer, others)
        self._expect = expect or ("ddp" if self._subject.is_ddp else "identical")
        self._compared = self._subject.compared(self._expect, stages)
        self._every = every
        self._on_divergence = on_divergence
        self._lag = lag
        self._stoppable = stoppable
        self._channel = channel or gloo_channel()
        self.hasher = hasher or hasher_for(tensor.device for tensor in self._subject.tensors())
        trace = trace or TraceWriter(None, self._channel.size, algorithm=self.hasher.algorithm)
        if trace.algorithm != self.hasher.algorithm:
            raise ValueError(
                f"trace: its header says {trace.algorithm!r}, and digests are {self.hasher.algorithm!r} here; "
                "create it with algorithm=hasher.algorithm."
            )
        self._exchange = Exchange(self._channel, self.hasher, trace, reference, self._expect == "ddp")
        self._wants_stop = False
        self._stop = False
        self._last_checked = -1
        if every:
            build = self._subject.state()
            if not steps_done:
                build.pop("optimizer", None)  # it has no state yet, and its settings are compared at step 1
            self._check(steps_done, None, self._start(build), lag=0, recorded=not steps_done)

    def step(
        self,
        *,
        batch: Batch | None = None,
        loss: Tensor | None = None,
        outputs: Batch | None = None,
        indices: Tensor | None = None,
        epoch: int | None = None,
        stop: bool = False,
        check: bool = False,
    ) -> bool:
        """Compares the state after a training step; call it after `optimizer.step()`.

        Once for each step of the optimizer, however many micro-batches its gradients were accumulated over; of several
        optimizers, once when all that a batch gives rise to is done. Gradients are compared as they are: call it before
        they are set to zero.

        Args:
            batch: what reached the model: a tensor, or tensors in dicts, lists and tuples; several micro-batches as a
                list of them.
            loss: the loss, 0-dim.
            outputs: the model's output: a tensor, or tensors in dicts, lists and tuples.
            indices: the samples' indices, int64.
            epoch: for the record.
            stop: this replica wants to stop, from now on.
            check: compare this step even if `every` would not: the last one before an evaluation or a checkpoint.

        Returns whether any replica wanted to stop, as of the newest completed comparison: the same on all replicas.
        With `every` 0 nothing is exchanged unless `stoppable`, so nobody learns of it and the answer is always False.
        """
        self.steps_done += 1
        self._wants_stop = self._wants_stop or stop
        self.last_word = None
        if self._every and (check or self.steps_done % self._every == 0):
            observation = self._start(self._subject.after_step(indices, batch, outputs, loss))
            self.bytes_per_step = observation.num_bytes
            self._check(self.steps_done, epoch, observation)
        elif self._stoppable:
            self._check(self.steps_done, epoch, self._start({}))
            self.last_word = None
        return self._stop

    def evaluation(
        self, predictions: Mapping[str, Tensor], epoch: int | None = None, batch: Batch | None = None
    ) -> None:
        """Compares an evaluation, as part of the step it follows; first the state, where that step was not compared.

        Args:
            predictions: the model's outputs, by name.
            epoch: for the record.
            batch: what they were made from; tensors, or digests as bytes, in dicts, lists or tuples.
        """
        self.complete()
        if self._every:
            self._compare_state()
            entries: dict[str, Iterable[Entry]] = {"predictions": predictions.items()}
            if batch is not None:
                entries["batch"] = batch_entries(batch)
            if self._compared & entries.keys():
                self._check(self.steps_done, epoch, self._start(entries), lag=0, phase="evaluation")

    def finish(self) -> None:
        """Completes what is under way and, where the last step was not compared, compares the final state.

        Notices when replicas have taken different numbers of steps. Warns where `step` was never given anything that is
        compared.
        """
        self.complete()
        self._compare_state()
        self._check(self.steps_done, None, self._start({}), lag=0)
        taken = self.steps_done - self._began_after
        if self._every and taken and not self.steps_checked and self._compared <= _GIVEN:
            given = ", ".join(stage for stage in STAGES if stage in self._compared)
            log.warning("nothing was compared in %d steps: step() was given none of %s", taken, given)

    def _compare_state(self) -> None:
        """Compares the state as it is now, unless the last step's comparison has."""
        state = self._subject.state()
        if self._last_checked < self.steps_done and self._compared & state.keys():
            self._check(self.steps_done, None, self._start(state), lag=0)

    def fingerprints(self) -> list[dict[str, str]]:
        """The digest of the weights, buffers and optimizer of every replica, 32 hex digits each. A collective."""
        state = self._subject.state()
        return self._channel.gather(
            {
                name: make_stage(state[name]).digest.hex()
                for name in ("weights", "buffers", "optimizer")
                if name in state
            }
        )

    def _check(
        self,
        step: int,
        epoch: int | None,
        observation: Observation,
        lag: int | None = None,
        phase: str | None = None,
        recorded: bool = True,
    ) -> None:
        self.complete()
        self.bytes_hashed += observation.num_bytes
        self.last_word = self._exchange.start(step, epoch, observation, self._wants_stop, phase, recorded)
        if not (self._lag if lag is None else lag):
            self.complete()

    def complete(self) -> bool:
        """Completes the comparison that is under way, if one is; returns what `step` does."""
        compared = self._exchange.complete()
        if compared is None:
            return self._stop
        outcome, stages = compared.outcome, compared.stages
        is_same = outcome.agreed and not outcome.apart
        self.stages_compared += len(stages)
        self._stop = self._stop or outcome.stop
        if stages and compared.phase is None:
            self._last_checked = compared.step
            if compared.step > 0 and compared.recorded:
                self.steps_checked += 1
            if is_same and self.divergence is None:
                self.agreed_until = compared.step
        if not is_same and self.divergence is None:
            self.diverged_stages = stages
            self.divergence, self.apart = self._exchange.describe(compared)
            if self._on_divergence == "stop":
                if self.apart is not None:
                    raise ReferenceDiffers(self.divergence, self.apart)
                raise Divergence(self.divergence)
        return self._stop

    def observe(
        self,
        *,
        indices: Tensor | None = None,
        batch: Batch | None = None,
        outputs: Batch | None = None,
        loss: Tensor | None = None,
    ) -> dict[str, Stage]:
        """This replica's stages as they are now, without comparing them; arguments as in `step`."""
        return self._start(self._subject.after_step(indices, batch, outputs, loss)).stages

    def _start(self, entries: Mapping[str, Iterable[Entry]]) -> Observation:
        """Hashes those of the stages that are compared, in causal order."""
        return self.hasher.start({name: entries[name] for name in STAGES if name in entries and name in self._compared})


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} will not do: give {' or '.join(map(repr, choices))}.")
