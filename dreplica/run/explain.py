"""Diagnosis of a divergence in a run: build again, replay the step, or conclude from what is known."""

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import RunConfig
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import Batch, reload_batch
from dreplica.data.samples import DataSets, at_epoch, uncached
from dreplica.diagnosis.decision.conclude import conclude, conclude_build
from dreplica.diagnosis.decision.decide_reference import AgainstReference
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.diagnose_run import Judge, can_replay, diagnose
from dreplica.diagnosis.evidence.observation import Decision
from dreplica.diagnosis.replay.rebuild import explain_build, rebuild
from dreplica.diagnosis.replay.replay_run import Replayer
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel
from dreplica.replica.build import build_replica
from dreplica.state.plain_state import PlainState
from dreplica.state.replica import Replica
from dreplica.training.fault_injection import Injector
from dreplica.training.history import History, StepEntry

log = logging.getLogger(__name__)

_PROVEN = "order-differs"
"""A cause that the comparison alone proves. A replay would only show the operators that the order reaches first."""
_MOST_BYTES = 2**26
"""Size in bytes above which a tensor of a data set is assumed to be its data, which no code writes to."""


@dataclass(frozen=True)
class Explainer:
    """The state of one replica from which its steps, or its build, can be repeated."""

    config: RunConfig
    """The config with this replica's overrides."""
    seed: int
    """The seed of this replica's build."""
    device: torch.device
    replica: Replica
    data: DataSets
    coordinator: IndexSampler
    injector: Injector
    channel: Channel
    facts: RunFacts

    def explain(self, found: Verdict, agreement: Agreement | None, history: History | None) -> Verdict:
        """Diagnose a divergence between replicas.

        Args:
            found: The verdict of the comparison.
            agreement: The comparison, None while the build is still being compared.
            history: The snapshots and the steps taken since, None while the build is still being compared.

        Returns:
            The verdict, with its cause.

        Note:
            Collective: call on every rank. The state of the replica and of the data set is restored.
        """
        if found.cause == _PROVEN:
            return conclude(found, self.facts)
        verdict = self.explain_build(found) if found.step == 0 else self.replay(found, agreement, history)
        return conclude(verdict, self.facts)

    def explain_reference(
        self, found: Verdict, against: AgainstReference, agreement: Agreement | None, history: History | None
    ) -> Verdict:
        """Diagnose a difference from the reference run.

        Args:
            found: The verdict of the comparison.
            against: The difference, and what is known about the reference.
            agreement: The comparison, None while the build is still being compared.
            history: The snapshots and the steps taken since, None while the build is still being compared.

        Returns:
            The verdict, with its cause.

        Note:
            Collective: call on every rank. The state of the replica and of the data set is restored.
        """
        account = against.account()
        if found.cause == _PROVEN:
            verdict = found
        elif found.step == 0:
            verdict = self.rebuild_alone(found, account)
        elif agreement is None or history is None or not can_replay(found, history):
            line = Evidence.of("reference-not-replayed")
            verdict = found.with_(cause=account.cause, evidence=[*found.evidence, line, *account.evidence])
        else:
            verdict = self.replay(found, agreement, history, against.judge)
        remedy = against.remedy(verdict.cause)
        return conclude(verdict.with_(evidence=[*verdict.evidence, *against.evidence()], remedy=remedy), self.facts)

    def rebuild_alone(self, found: Verdict, account: Decision) -> Verdict:
        """Build again, to test whether this run reproduces its own build."""
        build = partial(build_replica, self.config, self.data.num_classes, self.device)
        try:
            rebuilt = attempt(self.channel, lambda: rebuild(build, self.seed))
        except AttemptFailed as error:
            return found.with_(evidence=[*found.evidence, Evidence.of("rebuild-failed", error=error)])
        if not all(self.channel.gather(rebuilt.reproducible)):
            return explain_build(found, rebuilt, self.channel)
        line = Evidence.of("rebuild-reproduces")
        return found.with_(cause=account.cause, evidence=[*found.evidence, line, *account.evidence])

    def replay(
        self, found: Verdict, agreement: Agreement | None, history: History | None, judge: Judge | None = None
    ) -> Verdict:
        """Diagnose a divergence at a step by replaying the step.

        Args:
            found: The verdict of the comparison.
            agreement: The comparison, None while the build is still being compared.
            history: The snapshots and the steps taken since, None while the build is still being compared.
            judge: Decides on the cause from the observations of all replicas.

        Returns:
            The verdict, or `found` if the step cannot be replayed.

        Note:
            Collective: call on every rank. The state of the replica and of the data set is restored.
        """
        if agreement is None or history is None or not can_replay(found, history):
            return found
        log.info("diverged at step %s: replaying it to find the cause", found.step)
        make = partial(Replayer, self.replica, history, self.redraw, self.load, self.config.train, agreement)
        try:
            replayer = attempt(self.channel, make)
        except AttemptFailed as error:
            line = Evidence.of("replay-failed", error=error)
            return found.with_(cause="unexplained", evidence=[*found.evidence, line])
        original = agreement.diverged_stages
        num_workers = self.config.data.num_workers
        dataset = uncached(at_epoch(self.data.train, found.epoch or 1))
        data = PlainState([self.data.train], enter=_is_of_the_data, max_bytes=_MOST_BYTES)
        try:
            return diagnose(found, original, replayer, dataset, num_workers, self.channel, self.facts, judge)
        finally:
            data.restore()

    def explain_build(self, found: Verdict) -> Verdict:
        """Diagnose a divergence at the build by building again."""
        found = conclude_build(found, self.facts)
        if not self.facts.seeded or not self.facts.shared_seed:
            return found
        build = partial(build_replica, self.config, self.data.num_classes, self.device)
        try:
            rebuilt = attempt(self.channel, lambda: rebuild(build, self.seed))
        except AttemptFailed as error:
            return found.with_(evidence=[*found.evidence, Evidence.of("rebuild-failed", error=error)])
        return explain_build(found, rebuilt, self.channel)

    def redraw(self, entry: StepEntry) -> Tensor:
        """Return the indices of a step, (batch,) int64, as the coordinator drew them."""
        return self.coordinator.redraw(self.num_samples, self.config.data.batch_size, entry.epoch, entry.number)

    def load(self, indices: Tensor, entry: StepEntry) -> Batch:
        """Load the samples of a step again, with the faults that repeat in each replay."""
        received = indices.clone()
        self.injector.indices(entry.step, received, self.num_samples)
        memory_format = torch.channels_last if self.config.model.channels_last else torch.preserve_format
        dataset = at_epoch(self.data.train, entry.epoch)
        return reload_batch(dataset, received, self.device, memory_format, weights=self.data.weights)

    @property
    def num_samples(self) -> int:
        """Number of samples in the training set."""
        return len(self.data.train)  # type: ignore[arg-type]


def _is_of_the_data(value: object) -> bool:
    """Return True for a nested data set or a transform, which may both have their own random generators."""
    return callable(value) or hasattr(type(value), "__getitem__")
