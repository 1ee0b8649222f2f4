"""From a divergence in a run to its verdict: by building again, by replaying, or from what is known already."""

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
from dreplica.diagnosis.decision.conclude import RunFacts, conclude, conclude_build
from dreplica.diagnosis.decision.decide_reference import AgainstReference
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

_MOST_BYTES = 2**26
"""Tensors and arrays of a data set that are larger are taken to be the data, which nobody writes to."""


@dataclass(frozen=True)
class Explainer:
    """What it takes to run one replica's steps, or its build, again."""

    config: RunConfig
    """With this replica's overrides."""
    seed: int
    """Of this replica's build."""
    device: torch.device
    replica: Replica
    data: DataSets
    coordinator: IndexSampler
    injector: Injector
    channel: Channel
    facts: RunFacts

    def explain(self, found: Verdict, agreement: Agreement | None, history: History | None) -> Verdict:
        """The verdict on a divergence; leaves the replica, and the data set, as they are. A collective.

        Args:
            found: what the comparison says.
            agreement: None while the build is still being compared.
            history: of the steps taken since; None likewise.
        """
        verdict = self.explain_build(found) if found.step == 0 else self.replay(found, agreement, history)
        return conclude(verdict, self.facts)

    def explain_reference(
        self, found: Verdict, against: AgainstReference, agreement: Agreement | None, history: History | None
    ) -> Verdict:
        """The verdict on a difference from a reference. A collective, as `explain`."""
        account = against.account()
        if found.step == 0:
            verdict = self.rebuild_alone(found, account)
        elif agreement is None or history is None or not can_replay(found, history):
            line = Evidence.of("reference-not-replayed")
            verdict = found.with_(cause=account.cause, evidence=[*found.evidence, line, *account.evidence])
        else:
            verdict = self.replay(found, agreement, history, against.judge)
        remedy = against.remedy(verdict.cause)
        return conclude(verdict.with_(evidence=[*verdict.evidence, *against.evidence()], remedy=remedy), self.facts)

    def rebuild_alone(self, found: Verdict, account: Decision) -> Verdict:
        """Builds again, to see whether this side reproduces itself. A collective."""
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
        """What replays of the step tell; `found`, where it cannot be run again. A collective."""
        if agreement is None or history is None or not can_replay(found, history):
            return found
        log.info("parted at step %s: running it again to find out why", found.step)
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
        """Names the cause of a difference at the build, and the draw where the builds part."""
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
        """The indices of a step, as the coordinator drew them."""
        return self.coordinator.redraw(self.num_samples, self.config.data.batch_size, entry.epoch, entry.number)

    def load(self, indices: Tensor, entry: StepEntry) -> Batch:
        """The samples of a step, as the training loop loaded them; repeated faults strike here, too."""
        received = indices.clone()
        self.injector.indices(entry.step, received, self.num_samples)
        memory_format = torch.channels_last if self.config.model.channels_last else torch.preserve_format
        dataset = at_epoch(self.data.train, entry.epoch)
        return reload_batch(dataset, received, self.device, memory_format, weights=self.data.weights)

    @property
    def num_samples(self) -> int:
        """In the training set."""
        return len(self.data.train)  # type: ignore[arg-type]


def _is_of_the_data(value: object) -> bool:
    """Whether it is a data set within a data set, or a transform: both may draw from generators of their own."""
    return callable(value) or hasattr(type(value), "__getitem__")
