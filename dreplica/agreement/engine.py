"""The comparison behind `Agreement`: what is hashed when, exchanged, described and recorded."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from dreplica.agreement import protocol
from dreplica.agreement.arguments import InternalArguments
from dreplica.agreement.described import describe_compared
from dreplica.agreement.exchange import Compared
from dreplica.agreement.generators import GeneratorUse
from dreplica.agreement.hasher import Observation
from dreplica.agreement.kept_state import KeptStates, Original
from dreplica.agreement.opening import open_parts
from dreplica.agreement.reference import ReferenceDifference, ReferenceDiffers
from dreplica.agreement.result import count_warnings, describe_loss, describe_result
from dreplica.agreement.settings import Settings
from dreplica.agreement.subject import Batch, Subject
from dreplica.agreement.trace.report_records import Coverage
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.channel import Channel
from dreplica.distributed.control import open_channel
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.errors import SharedUsageError, UsageError
from dreplica.state.stages import STAGES, Entry, Stage, make_stage

log = logging.getLogger(__name__)

_RANK_0_FIRST_SECONDS = 0.5
"""Delay of the other ranks' exceptions. The launcher ends all processes when one fails, and rank 0 has the evidence."""

_PASSED_TO_STEP = frozenset({"indices", "batch", "output"})
"""Stages that are compared only if `step` is given them."""

Entries = Mapping[str, Iterable[Entry]]
"""Stage to the entries to hash."""


class Engine:
    """The comparisons of one run, one in progress at a time, and their results.

    Note:
        Collective: create it, and call all methods except `observe` and `close`, on every rank in the same order.

    Args:
        subject: The models and optimizers to compare.
        generators: Which global generators are compared.
        settings: What to compare, and when.
        record: Path of a new run folder, or None.
        reference: Path of a recorded run, or None.
        internal: The further keyword arguments of `Agreement`.

    Raises:
        Divergence, ReplicaLost, UsageError: As `Agreement` does.

    Attributes:
        subject: The models and optimizers to compare.
        generators: Which global generators are compared.
        hasher: What computes the fingerprints.
        divergence, steps_done, steps_checked, ...: As for `Agreement`.
    """

    def __init__(
        self,
        subject: Subject,
        generators: GeneratorUse,
        settings: Settings,
        record: str | None,
        reference: str | None,
        internal: InternalArguments,
    ) -> None:
        self.subject, self.generators, self._settings = subject, generators, settings
        self.steps_done = settings.steps_done
        self.steps_checked = self.stages_compared = 0
        self.stages_seen: set[str] = set()
        self.bytes_per_step = self.bytes_hashed = 0
        self.agreed_until = -1
        self.last_digest: protocol.CombinedDigest | None = None
        self.divergence: Verdict | None = None
        self.diverged_stages: dict[str, Stage] = {}
        self.reference_difference: ReferenceDifference | None = None
        self._stoppable = internal.get("stoppable", False)
        self._own_channel = internal.get("channel") is None
        self._channel: Channel = internal.get("channel") or open_channel(
            settings.group or subject.group, settings.timeout
        )
        self._read_entries: Callable[[], Entries] = subject.state
        self._kept = KeptStates(subject, steps=1 + settings.lag)
        self._wants_stop = self._stop = self._is_closed = False
        self._last_checked = -1
        try:
            self._begin(record, reference, internal)
        except BaseException as error:  # the caller gets no object to close
            self.close(None if isinstance(error, Divergence | SharedUsageError) else error)
            raise

    def _begin(self, record: str | None, reference: str | None, internal: InternalArguments) -> None:
        """Open what the comparison needs, and compare the build."""
        parts = open_parts(self.subject, self.generators, self._settings, self._channel, record, reference, internal)
        self.hasher, self.notices = parts.hasher, parts.notices
        self._shards, self._folders, self._exchange = parts.shards, parts.folders, parts.exchange
        if self._settings.every:
            build = self.subject.state()
            if not self.steps_done:
                build.pop("optimizer", None)  # it has no state yet, and its settings are compared at step 1
            self._check(self.steps_done, None, self._start(build), lag=0, recorded=not self.steps_done)
            self.notices.built(self.steps_done)

    def watch(self, batch: Batch | None, loss: Tensor | None, check: bool) -> None:
        """Look for mistakes that all replicas share, after a training step and before its comparison.

        Args:
            batch: What the model was given, if it is known.
            loss: The loss, if it is known.
            check: True if this step is compared even if `every` skips it.
        """
        every, step = self._settings.every, self.steps_done + 1
        if every:
            self.notices.step(step, batch, loss, is_compared=check or step % every == 0)

    def keep_state(self) -> None:
        """Copy the state that the coming step begins with, if that step will be compared."""
        every, step = self._settings.every, self.steps_done + 1
        if every and step % every == 0 and self.divergence is None:
            self._kept.keep(step)

    @property
    def original(self) -> Original:
        """What is known of the step at which replicas diverged."""
        found = self.divergence
        before = None if found is None or found.phase == "evaluation" else self._kept.before(found.step)
        versions = self._kept.versions(None if found is None else found.step)
        is_ddp = self._settings.expect == "ddp"
        return Original(self.subject, found, self.diverged_stages, before, versions, is_ddp, self.hasher)

    def step(self, entries: Callable[[], Entries], epoch: int | None, stop: bool, check: bool) -> bool:
        """Count a training step, and compare the state after it.

        Args:
            entries: Returns the entries of all stages after the step.
            epoch: The epoch, from 1, or None.
            stop: True if this replica wants to stop.
            check: Compare this step even if `every` skips it.

        Returns:
            True if any replica wanted to stop, as of the newest completed comparison.

        Raises:
            Divergence, ReplicaLost, TypeError: As `Agreement.step` does.
        """
        self.steps_done += 1
        self._channel.progress(self.steps_done)
        self._wants_stop = self._wants_stop or stop
        self.last_digest = None
        if self._settings.every and (check or self.steps_done % self._settings.every == 0):
            observation = self._start(entries())
            # With a lag, the arguments would be kept alive for another step.
            self._read_entries = self.subject.state if self._settings.lag else entries
            self.bytes_per_step = observation.num_bytes
            self._check(self.steps_done, epoch, observation)
        elif self._stoppable:
            self._check(self.steps_done, epoch, self._start({}))
            self.last_digest = None
        return self._stop

    def evaluation(self, entries: Entries, epoch: int | None) -> None:
        """Compare an evaluation, after the state of the step that it follows."""
        self.complete()
        if not self._settings.every:
            return
        self._compare_state()
        if self._settings.compared & entries.keys():
            self._read_entries = lambda: entries
            self._check(self.steps_done, epoch, self._start(entries), lag=0, phase="evaluation")

    def finish(self) -> Verdict:
        """Complete the comparison in progress, compare the final state, and log one line with the result."""
        self._channel.finish(self.steps_done)
        self.complete()
        self._compare_state()
        self._check(self.steps_done, None, self._start({}), lag=0)
        self.notices.finish(self.steps_done)
        self._channel.rest()
        taken, compared = self.steps_done - self._settings.steps_done, self._settings.compared
        if self._settings.every and taken and not self.steps_checked and compared <= _PASSED_TO_STEP:
            missing = ", ".join(stage for stage in STAGES if stage in compared)
            log.warning("nothing was compared in %d steps: step() was given none of %s", taken, missing)
        coverage = self._coverage(self._folders.equal_to_reference())
        warnings = self.notices.warnings
        line = describe_result(coverage, taken, self.steps_checked, self.stages_seen, self._folders.record)
        line += count_warnings(warnings)
        agreed = Verdict(agreed=coverage.has_second_copy, cause="none", summary=line, evidence=list(warnings))
        verdict = self.divergence or agreed
        digests = self.fingerprints() if self._folders.record else []
        self._folders.conclude(verdict, coverage, self.steps_checked, self.steps_done, digests, warnings)
        if not self._settings.quiet and self._channel.rank == 0:
            log.info(line if self.divergence is None else f"DIVERGED {verdict.summary}")
        return verdict

    def close(self, error: BaseException | None) -> None:
        """Release what this object holds, and report to the other ranks the error that only this one raises."""
        self._is_closed = True
        try:
            if hasattr(self, "_folders"):  # otherwise the constructor has failed before
                self.notices.close()
                self._folders.close()
        finally:
            if self._own_channel:
                self._channel.close(error)

    def check_open(self) -> None:
        """Raise `UsageError` if this object is closed."""
        if self._is_closed:
            raise UsageError("this Agreement is closed. Call close() last, or create another one.", code="closed")

    def complete(self) -> bool:
        """Complete the comparison in progress, if there is one, and return the same as `step`."""
        try:
            compared = self._exchange.complete()
            if compared is not None and self.divergence is None:
                self._notice(compared)
        except ReplicaLost as error:
            self._conclude(describe_loss(error, self.agreed_until))
            raise
        if compared is None:
            return self._stop
        self._folders.check_repeated()
        outcome, stages = compared.outcome, compared.stages
        is_same = outcome.agreed and not outcome.differs_from_reference
        self.stages_compared += len(stages)
        shards = self._shards
        self.stages_seen.update(
            name for name, stage in stages.items() if stage.names and (shards is None or shards.has_copies(name))
        )
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
            if self._settings.on_divergence == "stop":
                self._raise(self.divergence)
        return self._stop

    def _notice(self, compared: Compared) -> None:
        """Look for mistakes that all replicas share in a state on which all agree."""
        outcome = compared.outcome
        if compared.stages and compared.phase is None and outcome.agreed and not outcome.differs_from_reference:
            self.notices.compared(compared.step, compared.stages)

    def _raise(self, divergence: Verdict) -> None:
        """Write the report, and raise the divergence."""
        self._conclude(divergence)
        if self._channel.rank and not self._settings.quiet:
            time.sleep(_RANK_0_FIRST_SECONDS)
        if self.reference_difference is not None:
            raise ReferenceDiffers(divergence, self.reference_difference, self._channel.rank)
        raise Divergence(divergence, self._channel.rank)

    def _describe(self, compared: Compared) -> tuple[Verdict, ReferenceDifference | None]:
        """Return the verdict on a difference, the same on all ranks."""
        parts = self._exchange, self.subject, self.generators, self.hasher, self._channel
        verdict, difference = describe_compared(compared, self._read_entries, *parts)
        if difference is not None:
            before = self._settings.steps_done
            resumed = [Evidence.of("run-resumed", step=before)] if before else []
            evidence = [*verdict.evidence[:1], *resumed, *verdict.evidence[1:], *self._folders.environment()]
            verdict = verdict.with_(evidence=evidence)
        return verdict, difference

    def _conclude(self, verdict: Verdict) -> None:
        """Write the report of a run that does not finish, without communication."""
        reference = self._folders.reference
        coverage = self._coverage(None if reference is None else (reference.num_steps, reference.stages))
        self._folders.conclude(verdict, coverage, self.steps_checked, None, (), self.notices.warnings)

    def _coverage(self, equal: tuple[int, Collection[str]] | None) -> Coverage:
        settings, shards = self._settings, self._shards
        seen = self.steps_checked, self.stages_seen
        coverage = self._folders.coverage(settings.every, *seen, settings.compared, equal)
        return coverage if shards is None else shards.cover(coverage)

    def fingerprints(self) -> list[dict[str, str]]:
        """Gather digests of the weights, buffers and optimizer of every replica, as 32 hex digits."""
        state = self.subject.state()
        names = [name for name in ("weights", "buffers", "optimizer") if name in state]
        return self._channel.gather({name: make_stage(state[name]).digest.hex() for name in names})

    def observe(self, entries: Entries) -> dict[str, Stage]:
        """Return this replica's digests of the stages that are compared, without comparing them."""
        return self._start(entries).stages

    def _compare_state(self) -> None:
        """Compare the current state, unless the last step's comparison covered it."""
        state = self.subject.state()
        self._read_entries = self.subject.state
        if self._last_checked < self.steps_done and self._settings.compared & state.keys():
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
        not_drawn = self.generators.not_drawn
        arguments = step, epoch, observation, self._wants_stop, phase, recorded, not_drawn
        self.last_digest = self._exchange.start(*arguments)
        if not (self._settings.lag if lag is None else lag):
            self.complete()

    def _start(self, entries: Entries) -> Observation:
        """Start hashing the compared ones of the given stages, in causal order."""
        compared = self._settings.compared
        stages = {name: entries[name] for name in STAGES if name in entries and name in compared}
        if self._shards is None:
            return self.hasher.start(stages)
        parts, splits = self._shards.parts(stages)
        observation = self.hasher.start(parts)
        observation.splits = splits
        return observation
