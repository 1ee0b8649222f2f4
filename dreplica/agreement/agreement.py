"""`Agreement`: check after every step of a training loop that all replicas hold the same bits."""

import os
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Unpack

from torch import Tensor

from dreplica.agreement.arguments import InternalArguments, check_arguments, check_epoch, check_stages, path_of
from dreplica.agreement.engine import Engine
from dreplica.agreement.generators import GeneratorUse
from dreplica.agreement.result import show_log
from dreplica.agreement.run_results import Results
from dreplica.agreement.settings import Settings
from dreplica.agreement.subject import Batch, Expect, Models, Subject
from dreplica.agreement.trace.line import GENERATORS
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.state.stages import Entry, Optimizers, Stage, batch_entries, prediction_entries


class Agreement(Results):
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
        group: The process group of the ranks to compare, of which this rank is a member. Default: that in which
            DistributedDataParallel averages the model's gradients, otherwise the default group.
        mesh: The DeviceMesh of all ranks, for a model that is sharded over some of its axes. Each tensor is compared
            along the axes over which it is not split. Default: the mesh of the model's DTensors.
        partitioned: The names of the mesh's axes along which ranks hold different tensors, such as pipeline stages.
        expect: What must agree. "identical": all of `stages`. "independent" (replicas with different seeds): `indices`
            and `batch` only. "ddp" (each rank has its own batch and gradients are averaged): `gradients`, `optimizer`,
            `weights`, and `buffers` unless DistributedDataParallel broadcasts them (`broadcast_buffers`, its default).
            Default: "ddp" if a model is wrapped in DistributedDataParallel or sharded, otherwise "identical".
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
    """

    def __init__(
        self,
        model: Models,
        optimizer: Optimizers = None,
        *,
        others: Sequence[Any] = (),
        record: str | os.PathLike[str] | None = None,
        reference: str | os.PathLike[str] | None = None,
        group: Any = None,
        mesh: Any = None,
        partitioned: Collection[str] = (),
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
        quiet = internal.get("quiet", False)
        generators = GeneratorUse(GENERATORS if internal.get("all_generators") else ())
        self._subject = Subject(model, optimizer, others, generators.entries)
        expect = expect or ("ddp" if self._subject.is_ddp else "identical")
        check_stages(stages, expect)
        compared = self._subject.compared(expect, stages)
        settings = Settings(
            expect,
            compared,
            every,
            on_divergence,
            lag,
            timeout,
            steps_done,
            quiet,
            group=group,
            mesh=mesh,
            partitioned=tuple(partitioned),
        )
        if not quiet:
            show_log()
        self._engine = Engine(self._subject, generators, settings, *paths, internal)

    def keep_state(self) -> None:
        """Keep a copy of the state that the coming step begins with, for `dreplica.diagnose`.

        ```python
        for batch in loader:
            agreement.keep_state()
            loss = training_step(batch)
            agreement.step(batch=batch, loss=loss)  # if it raises: dreplica.diagnose(..., agreement=agreement)
        ```

        `dreplica.diagnose` then replays a diverged step from the state that each rank had, with its own random number
        generators, settings and gradients, and compares the replay with the original.

        Call it where the step begins, after the batch is loaded. It copies parameters, buffers, gradients, the state of
        the optimizers and of `others`, generators, and plain attributes of modules. The copy stays on the device, in
        memory that is allocated once (twice with `lag=1`). Steps that `every` skips are not copied.

        Raises:
            UsageError: If the Agreement is closed.
        """
        self._engine.check_open()
        self._engine.keep_state()

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
        self._engine.check_open()
        check_epoch(epoch)
        self._engine.watch(batch, loss, check)
        return self._engine.step(partial(self._subject.after_step, indices, batch, outputs, loss), epoch, stop, check)

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
        self._engine.check_open()
        check_epoch(epoch)
        entries: dict[str, Iterable[Entry]] = {"predictions": prediction_entries(predictions)}
        if batch is not None:
            entries["batch"] = batch_entries(batch)
        self._engine.evaluation(entries, epoch)

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
        self._engine.check_open()
        return self._engine.finish()

    def close(self) -> None:
        """Release the run folder and the connections to the other ranks. Nothing can be compared afterwards.

        `with dreplica.Agreement(...) as agreement:` calls it at the end of the block, after an exception, too.
        """
        self._engine.close(None)

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._engine.close(None if isinstance(error, Divergence) else error)

    def complete(self) -> bool:
        """Complete the comparison in progress, if there is one.

        Note:
            Collective: call it on every rank.

        Returns:
            The same as `step`.

        Raises:
            Divergence, ReplicaLost: As `step` does.
        """
        return self._engine.complete()

    def fingerprints(self) -> list[dict[str, str]]:
        """Gather digests of the weights, buffers and optimizer of every replica.

        Note:
            Collective: call it on every rank.

        Returns:
            For each replica, stage name to 32 hex digits.
        """
        return self._engine.fingerprints()

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
        return self._engine.observe(self._subject.after_step(indices, batch, outputs, loss))
