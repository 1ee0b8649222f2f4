"""`Agreement`: check after every step of a training loop that all replicas hold the same bits."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from dreplica.agreement import protocol
from dreplica.agreement.arguments import (
    InternalArguments,
    check_algorithm,
    check_arguments,
    check_epoch,
    check_stages,
    path_of,
)
from dreplica.agreement.exchange import Compared, Exchange
from dreplica.agreement.generators import GeneratorUse
from dreplica.agreement.hasher import Observation, negotiated_hasher
from dreplica.agreement.reference import ReferenceDifference, ReferenceDiffers
from dreplica.agreement.result import describe_loss, describe_result, show_log
from dreplica.agreement.run_folders import RunFolders
from dreplica.agreement.settings import exchange_settings
from dreplica.agreement.subject import Batch, Expect, Models, Subject
from dreplica.agreement.trace.line import GENERATORS
from dreplica.agreement.trace.report_records import Coverage
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.values import read_values
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.control import open_channel
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.environment.facts import collect_environment
from dreplica.errors import SharedUsageError, UsageError
from dreplica.state.stages import STAGES, Entry, Optimizers, Stage, batch_entries, make_stage, prediction_entries

log = logging.getLogger(__name__)

_RANK_0_FIRST_SECONDS = 0.5
"""Delay of the other ranks' exceptions. The launcher ends all processes when one fails, and rank 0 has the evidence."""

_PASSED_TO_STEP = frozenset({"indices", "batch", "output"})
"""Stages that are compared only if `step` is given them."""


class Agreement:
    """Comparison of the training state of all replicas after every step, bit for bit.

    ```python
    agreement = dreplica.Agreement(model, optimizer, record="runs/a")
    for inputs, labels in loader:
        ...
        optimizer.step()
        agreement.step(batch=(inputs, labels), loss=loss)
    agreement.finish()
    ```

    In a process group, the ranks are compared with each other. With `record`, the run is recorded, and with `reference`
    it is compared with a recorded one, with or without a process group.

    Creating an `Agreement` compares the build (step 0). Seed torch with the same value on every rank first, and Python
    and NumPy where the script uses their generators: these two are compared once something has drawn from them.

    Note:
        Collective: create it, and call `step`, `complete`, `evaluation` and `finish`, on every rank in the same order.

    Args:
        model: The model whose parameters, buffers and gradients are compared, or several by name:
            `{"generator": g, "critic": c}`. Verdicts name tensors as in the bare model, without the prefixes of
            DistributedDataParallel and `torch.compile`.
        optimizer: The optimizer whose settings and state are compared, several by name, or None.
        others: Further objects with a `state_dict` that belong to the stage `optimizer`: a learning rate scheduler,
            a GradScaler. None items are skipped.
        record: Path of a new run folder, which rank 0 writes: the digests of every step and tensor, the environment,
            the script's arguments and commit, and the report. Compare two of them with `dreplica compare A B`.
        reference: Path of a recorded run to compare with, step by step.
        expect: What must agree. "identical": all of `stages`. "independent" (replicas with different seeds): `indices`
            and `batch` only. "ddp" (each rank has its own batch and gradients are averaged): `gradients`, `optimizer`,
            `weights`, and `buffers` unless DistributedDataParallel broadcasts them (`broadcast_buffers`, its default).
            Default: "ddp" if a model is wrapped in DistributedDataParallel, otherwise "identical".
        stages: The names of the stages to compare. Default: every stage that must agree.
        every: Compare every this many steps. 0 disables comparisons; steps are still counted.
        on_divergence: "stop" raises `Divergence` at the first difference. "continue" stores its verdict in
            `divergence` and continues.
        lag: 0 compares each step at once. 1 completes the comparison during the next step, so that replicas do not
            wait for each other. The verdict names the exact step in both cases.
        timeout: Seconds to wait for another rank before it counts as lost.
        steps_done: Number of steps taken before, when training resumes. The current state is then compared in place of
            the build, and an existing folder of `record` is continued.
        **internal: Arguments of the trainer (`InternalArguments`), which may change without notice.

    Raises:
        UsageError: If an argument is invalid (also a ValueError; `code` and `fields` say which one), or if
            `WORLD_SIZE` is above 1 without a process group.
        TypeError: If a tensor has no memory to hash (a meta, fake or lazy tensor).
        Divergence: If replicas differ and `on_divergence` is "stop". `verdict` says where.
        ReplicaLost: If another replica ended or stopped responding.

    Attributes:
        divergence: The verdict of the first difference, or None.
        steps_done: Number of calls of `step`, plus the argument `steps_done`.
        steps_checked: Number of steps that were compared.
        bytes_per_step: Bytes of tensors that this replica hashed in the newest compared step; 0 before the first.
        bytes_hashed: Bytes of tensors that this replica hashed in total.
        stages_compared: Number of stages compared, summed over all comparisons.
        stages_seen: Names of the stages that were compared at least once.
        agreed_until: The newest step at which all replicas are known to have agreed; -1 before the build's comparison.
        last_digest: Combined digest of what this replica compared last; None after a step that is not compared.
        diverged_stages: Digests of this replica's stages at the first difference.
        reference_difference: The first difference from the reference, the same on all replicas, or None.
    """

    def __init__(
        self,
        model: Models,
        optimizer: Optimizers = None,
        *,
        others: Sequence[Any] = (),
        record: str | os.PathLike[str] | None = None,
        reference: str | os.PathLike[str] | None = None,
        expect: Expect | None = None,
        stages: Collection[str] | None = None,
        every: int = 1,
        on_divergence: Literal["stop", "continue"] = "stop",
        lag: Literal[0, 1] = 0,
        timeout: float = 300.0,
        steps_done: int = 0,
        **internal: Unpack[InternalArguments],
    ) -> None:
        check_arguments(expect, on_divergence, lag, every, timeout, steps_done, internal)
        paths = path_of("record", record), path_of("reference", reference)
        self.steps_done = self._steps_before = steps_done
        self.steps_checked = self.stages_compared = 0
        self.stages_seen: set[str] = set()
        self.bytes_per_step = self.bytes_hashed = 0
        self.agreed_until = -1
        self.last_digest: protocol.CombinedDigest | None = None
        self.divergence: Verdict | None = None
        self.diverged_stages: dict[str, Stage] = {}
        self.reference_difference: ReferenceDifference | None = None
        self._quiet = internal.get("quiet", False)
        self._generators = GeneratorUse(GENERATORS if internal.get("all_generators") else ())
        self._subject = Subject(model, optimizer, others, self._generators.entries)
        self._expect = expect or ("ddp" if self._subject.is_ddp else "identical")
        check_stages(stages, self._expect)
        self._compared = self._subject.compared(self._expect, stages)
        self._every, self._lag, self._on_divergence = every, lag, on_divergence
        self._stoppable = internal.get("stoppable", False)
        self._own_channel = internal.get("channel") is None
        self._channel = internal.get("channel") or open_channel(timeout=timeout)
        if not self._quiet:
            show_log()
        self._read_entries: Callable[[], Mapping[str, Iterable[Entry]]] = self._subject.state
        self._wants_stop = self._stop = self._is_closed = False
        self._last_checked = -1
        try:
            self._begin(*paths, internal)
        except BaseException as error:  # the caller gets no object to close
            self._close(None if isinstance(error, Divergence | SharedUsageError) else error)
            raise

    def _begin(self, record: str | None, reference: str | None, internal: InternalArguments) -> None:
        """Open the run folders, and compare the build."""
        self._open(record, reference, internal)
        if self._every:
            build = self._subject.state()
            if not self.steps_done:
                build.pop("optimizer", None)  # it has no state yet, and its settings are compared at step 1
            self._check(self.steps_done, None, self._start(build), lag=0, recorded=not self.steps_done)

    def _open(self, record: str | None, reference: str | None, internal: InternalArguments) -> None:
        """Agree with the other ranks on the settings, and open the run folders."""
        settings: dict[str, Any] = {"expect": self._expect, "stages": sorted(self._compared), "every": self._every}
        settings |= {"lag": self._lag, "on_divergence": self._on_divergence, "steps_done": self.steps_done}
        settings |= {"record": record, "reference": reference}
        compares_rng = "rng" in self._compared and self._every and self._generators.not_drawn
        unseeded = exchange_settings(self._channel, settings, self._generators.first_digests if compares_rng else {})
        devices = [tensor.device for tensor in self._subject.tensors()]
        self.hasher = internal.get("hasher") or negotiated_hasher(devices, self._channel if self._every else None)
        manifest = collect_environment(devices[0] if devices else torch.device("cpu")) if record or reference else {}
        run = self.hasher.algorithm, self._expect, self.steps_done
        self._folders = RunFolders(self._channel, record, reference, manifest, *run)
        if self.steps_done:
            self._generators.resume(self._folders.not_drawn())
        trace = internal.get("trace") or self._folders.trace
        trace = trace or TraceWriter(None, self._channel.size, algorithm=self.hasher.algorithm)
        check_algorithm(trace, self.hasher)
        recorded = internal.get("recorded") or self._folders.reference
        is_ddp = self._expect == "ddp"
        comparison = self._channel, self.hasher, trace, recorded, is_ddp, unseeded
        self._exchange = Exchange(*comparison, with_advice=not self._quiet)

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
        """Compare the state after a training step.

        Call it once for each step of the optimizer, after `optimizer.step()` and before gradients are set to zero,
        however many micro-batches the gradients were accumulated over. With several optimizers, call it once when all
        of them have stepped for a batch.

        Note:
            Collective: call it on every rank.

        Args:
            batch: What the model was given: a tensor, or tensors in dicts, lists, tuples and dataclasses. Pass several
                micro-batches as a list.
            loss: The loss, a 0-dim tensor.
            outputs: The model's output: a tensor, or tensors in dicts, lists, tuples and dataclasses.
            indices: Indices of the samples in the dataset, int64.
            epoch: The epoch, from 1, for the verdict and the trace.
            stop: True if this replica wants to stop. It stays set for later steps.
            check: Compare this step even if `every` skips it, such as the last step before a checkpoint.

        Returns:
            True if any replica wanted to stop, as of the newest completed comparison; the same on all replicas.
            Always False with `every=0`, since nothing is exchanged then.

        Raises:
            Divergence: If replicas differ and `on_divergence` is "stop".
            ReplicaLost: If another replica ended or stopped responding.
            TypeError: If `batch` or `outputs` contains something that cannot be hashed.
            UsageError: If `epoch` is not an integer, or the Agreement is closed.
        """
        self._check_open()
        check_epoch(epoch)
        self.steps_done += 1
        self._channel.progress(self.steps_done)
        self._wants_stop = self._wants_stop or stop
        self.last_digest = None
        if self._every and (check or self.steps_done % self._every == 0):
            entries = partial(self._subject.after_step, indices, batch, outputs, loss)
            observation = self._start(entries())
            # With a lag, the arguments would be kept alive for another step.
            self._read_entries = self._subject.state if self._lag else entries
            self.bytes_per_step = observation.num_bytes
            self._check(self.steps_done, epoch, observation)
        elif self._stoppable:
            self._check(self.steps_done, epoch, self._start({}))
            self.last_digest = None
        return self._stop

    def evaluation(self, predictions: Batch, epoch: int | None = None, batch: Batch | None = None) -> None:
        """Compare an evaluation, as part of the step that it follows.

        If that step's state was not compared yet, it is compared first.

        Note:
            Collective: call it on every rank.

        Args:
            predictions: The model's outputs: a tensor, or tensors in dicts, lists, tuples and dataclasses.
            epoch: The epoch, from 1, for the verdict and the trace.
            batch: What the predictions were made from: tensors, or digests as bytes, in dicts, lists or tuples.

        Raises:
            Divergence, ReplicaLost: As `step` does.
            TypeError: If `predictions` or `batch` contains something that cannot be hashed.
        """
        self._check_open()
        check_epoch(epoch)
        self.complete()
        if self._every:
            self._compare_state()
            entries: dict[str, Iterable[Entry]] = {"predictions": prediction_entries(predictions)}
            if batch is not None:
                entries["batch"] = batch_entries(batch)
            if self._compared & entries.keys():
                self._read_entries = lambda: entries
                self._check(self.steps_done, epoch, self._start(entries), lag=0, phase="evaluation")

    def finish(self) -> Verdict:
        """Complete the comparison in progress, compare the final state, and log one line with the result.

        Also finds replicas that have taken different numbers of steps. The line says what was compared: `AGREED` with a
        second copy, `RECORDED` without one, `NOT COMPARED` where nothing was compared or recorded. With `record`, the
        report is written.

        Note:
            Collective: call it on every rank.

        Returns:
            The verdict: `divergence` if there was one, otherwise one with cause "none", whose summary is the line.

        Raises:
            Divergence, ReplicaLost: As `step` does.
        """
        self._check_open()
        self._channel.finish(self.steps_done)
        self.complete()
        self._compare_state()
        self._check(self.steps_done, None, self._start({}), lag=0)
        self._channel.rest()
        taken = self.steps_done - self._steps_before
        if self._every and taken and not self.steps_checked and self._compared <= _PASSED_TO_STEP:
            missing = ", ".join(stage for stage in STAGES if stage in self._compared)
            log.warning("nothing was compared in %d steps: step() was given none of %s", taken, missing)
        coverage = self._coverage(self._folders.equal_to_reference())
        line = describe_result(coverage, taken, self.steps_checked, self.stages_seen, self._folders.record)
        verdict = self.divergence or Verdict(agreed=coverage.has_second_copy, cause="none", summary=line)
        digests = self.fingerprints() if self._folders.record else []
        self._folders.conclude(verdict, coverage, self.steps_checked, self.steps_done, digests)
        if not self._quiet and self._channel.rank == 0:
            log.info(line if self.divergence is None else f"DIVERGED {verdict.summary}")
        return verdict

    def close(self) -> None:
        """Release the run folder and the connections to the other ranks. Nothing can be compared afterwards.

        `with dreplica.Agreement(...) as agreement:` calls it at the end of the block, after an exception, too.
        """
        self._close(None)

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close(None if isinstance(error, Divergence) else error)

    def _close(self, error: BaseException | None) -> None:
        """Release what this object holds, and report to the other ranks the error that only this one raises."""
        self._is_closed = True
        try:
            if hasattr(self, "_folders"):  # otherwise the constructor has failed before
                self._folders.close()
        finally:
            if self._own_channel:
                self._channel.close(error)

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("this Agreement is closed. Call close() last, or create another one.", code="closed")

    def complete(self) -> bool:
        """Complete the comparison in progress, if there is one.

        Note:
            Collective: call it on every rank.

        Returns:
            The same as `step`.

        Raises:
            Divergence, ReplicaLost: As `step` does.
        """
        try:
            compared = self._exchange.complete()
        except ReplicaLost as error:
            self._conclude(describe_loss(error, self.agreed_until))
            raise
        if compared is None:
            return self._stop
        self._folders.check_repeated()
        outcome, stages = compared.outcome, compared.stages
        is_same = outcome.agreed and not outcome.differs_from_reference
        self.stages_compared += len(stages)
        self.stages_seen.update(name for name, stage in stages.items() if stage.names)
        self._stop = self._stop or outcome.stop
        if stages and compared.phase is None:
            self._last_checked = compared.step
            if compared.step > 0 and compared.recorded:
                self.steps_checked += 1
            if is_same and self.divergence is None:
                self.agreed_until = compared.step
        if not is_same and self.divergence is None:
            self.diverged_stages = stages
            self.divergence, self.reference_difference = self._describe(compared)
            if self._on_divergence == "stop":
                self._conclude(self.divergence)
                if self._channel.rank and not self._quiet:
                    time.sleep(_RANK_0_FIRST_SECONDS)
                if self.reference_difference is not None:
                    raise ReferenceDiffers(self.divergence, self.reference_difference, self._channel.rank)
                raise Divergence(self.divergence, self._channel.rank)
        return self._stop

    def _describe(self, compared: Compared) -> tuple[Verdict, ReferenceDifference | None]:
        """Return the verdict on a difference, the same on all ranks."""

        def values(stage: str, names: Sequence[str]) -> dict[str, str]:
            entries = self._read_entries()
            if stage not in compared.stages or stage not in entries:
                return {}
            return read_values(self.hasher, compared.stages[stage], entries[stage], names)

        verdict, difference = self._exchange.describe(compared, values)
        if difference is not None:
            resumed = [Evidence.of("run-resumed", step=self._steps_before)] if self._steps_before else []
            evidence = [*verdict.evidence[:1], *resumed, *verdict.evidence[1:], *self._folders.environment()]
            verdict = verdict.with_(evidence=evidence)
        return verdict, difference

    def _conclude(self, verdict: Verdict) -> None:
        """Write the report of a run that does not finish, without communication."""
        reference = self._folders.reference
        coverage = self._coverage(None if reference is None else (reference.num_steps, reference.stages))
        self._folders.conclude(verdict, coverage, self.steps_checked, None)

    def _coverage(self, equal: tuple[int, Collection[str]] | None) -> Coverage:
        return self._folders.coverage(self._every, self.steps_checked, self.stages_seen, self._compared, equal)

    def fingerprints(self) -> list[dict[str, str]]:
        """Gather digests of the weights, buffers and optimizer of every replica.

        Note:
            Collective: call it on every rank.

        Returns:
            For each replica, stage name to 32 hex digits.
        """
        state = self._subject.state()
        names = [name for name in ("weights", "buffers", "optimizer") if name in state]
        return self._channel.gather({name: make_stage(state[name]).digest.hex() for name in names})

    def observe(
        self,
        *,
        indices: Tensor | None = None,
        batch: Batch | None = None,
        outputs: Batch | None = None,
        loss: Tensor | None = None,
    ) -> dict[str, Stage]:
        """Return the digests of this replica's current state, without comparing them.

        Args:
            indices: As for `step`.
            batch: As for `step`.
            outputs: As for `step`.
            loss: As for `step`.

        Returns:
            Stage name to its digests, in causal order, for the stages that are compared.
        """
        return self._start(self._subject.after_step(indices, batch, outputs, loss)).stages

    def _compare_state(self) -> None:
        """Compare the current state, unless the last step's comparison covered it."""
        state = self._subject.state()
        self._read_entries = self._subject.state
        if self._last_checked < self.steps_done and self._compared & state.keys():
            self._check(self.steps_done, None, self._start(state), lag=0)

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
        not_drawn = self._generators.not_drawn
        arguments = step, epoch, observation, self._wants_stop, phase, recorded, not_drawn
        self.last_digest = self._exchange.start(*arguments)
        if not (self._lag if lag is None else lag):
            self.complete()

    def _start(self, entries: Mapping[str, Iterable[Entry]]) -> Observation:
        """Start hashing the compared ones of the given stages, in causal order."""
        return self.hasher.start({name: entries[name] for name in STAGES if name in entries and name in self._compared})
