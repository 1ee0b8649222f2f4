"""The life of a run: prepare, preflight, build, train, conclude."""

import logging
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Literal

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher, common_hasher, describe_fallback
from dreplica.agreement.reference import ReferenceDifference, ReferenceDiffers
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.report_records import DistanceRecord, SkippedCheckpoint, SkippedSamples, SpreadRecord
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.diagnosis.decision import conclude as diagnosis
from dreplica.diagnosis.decision.learning_check import LearningWatch
from dreplica.diagnosis.measurement.replica_distance import measure_distance
from dreplica.distributed.liveness import Lost, ReplicaLost, exit_code_of, find_lost_replicas
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.errors import ExitCode, UsageError
from dreplica.report.record.recorder import Recorder
from dreplica.report.record.terminal import ProgressDisplay, Screen
from dreplica.report.record.trackers import check_trackers
from dreplica.run.bootstrap import Prepared, end_at_once, meet
from dreplica.run.explain import Explainer
from dreplica.run.reference_run import Referring
from dreplica.run.setup import Concluded, Preparation
from dreplica.state.progress import Position
from dreplica.training.checkpoint.manager import Checkpoints, Start
from dreplica.training.events import EpochDone, StepDone, Stopped
from dreplica.training.fault_injection import FaultyCoordinator
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.seed_spread import measure_spread

log = logging.getLogger(__name__)

AGREEMENT_LAG: Literal[1] = 1


def run_worker(argv: Sequence[str]) -> ExitCode:
    """One replica of a run, from its command line to its exit code."""
    return meet(argv, lambda prepared, world, stop_request: Run(prepared, world, stop_request).conduct())


class Run:
    """One replica's part in a run. The methods stand in the order in which they are called."""

    def __init__(self, prepared: Prepared, world: World, stop_request: StopRequest) -> None:
        self.config, self.own, self.device = prepared.config, prepared.own, prepared.device
        self.world, self.channel = world, world.channel
        self.stop_request = stop_request
        self.parts = Preparation(prepared, world)
        self.expect = self.parts.expect
        self.facts = self.parts.facts
        self.agreement: Agreement | None = None
        self.history: History | None = None
        self.explained: Verdict | None = None
        self.start = Start()
        self.stopped_with: ExitCode | None = None
        self.warnings = list(prepared.warnings)
        self.console = Screen()
        run = self.config.run
        name, report = str(run.name), self.config.report
        every = self.config.agreement.every
        self.recorder = Recorder(world, self.console, run, name, self.expect, self.config.to_yaml(), report, every)

    @property
    def report(self) -> RunReport:
        """What is recorded, once the run folder is open."""
        assert self.recorder.report is not None
        return self.recorder.report

    def conduct(self) -> ExitCode:
        """The whole run. Every way it can end, on any replica, ends it on all of them."""
        try:
            return self.conclude(self.reach_verdict())
        except UsageError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            lost = self.conclude_without(error)
            if self.world.monitor is not None:
                end_at_once(exit_code_of(lost))
            raise

    def reach_verdict(self) -> Verdict:
        """Prepares, builds, trains and, where replicas part, explains. A collective."""
        try:
            # Another replica's input may be unusable, too.
            check = partial(check_trackers, self.config.report)
            self.world.together(check if self.world.is_coordinator else lambda: None)
            self.hasher = self.choose_hasher()
            self.referring = Referring(self.config, self.world, self.hasher.algorithm)
            self.parts.prepare()
            self.data, self.replica, self.injector = self.parts.data, self.parts.replica, self.parts.injector
            self.open_record()
            self.referring.look_into(self.recorder.folder, self.facts.manifests)
            self.start = self.go_on()
            data_seed = self.parts.data_seed if self.start.data_seed is None else self.start.data_seed
            self.coordinator = FaultyCoordinator(self.channel, data_seed, self.injector)
            return self.train()
        except Concluded as end:
            return end.verdict
        except ReferenceDiffers as difference:
            return self.explain(difference.verdict, difference.difference)
        except Divergence as divergence:
            return self.explain(divergence.verdict)

    def train(self) -> Verdict:
        """Trains to the end and returns the verdict; raises Divergence where replicas part and are to stop."""
        kept = len(self.data.train) if self.own.data.cache != "none" else 0  # type: ignore[arg-type]
        display = ProgressDisplay(self.console, self.world.is_coordinator, self.expect, kept)
        watch = LearningWatch(self.replica, settled=self.start.step > 0)
        with closing(display), self.open_trace() as trace:
            if trace.num_missing:
                self.report.warnings.append(f"trace.jsonl has lost its last {trace.num_missing} lines: it has a gap")
            agreement = self.agreement = self.make_agreement(trace)
            agreement.steps_checked = self.start.steps_checked
            history = self.history = self.make_history()
            for event in train(
                self.replica,
                self.data,
                self.coordinator,
                agreement,
                self.own,
                self.world,
                self.device.device,
                self.stop_request,
                history,
                self.start.position,
            ):
                match event:
                    case StepDone():
                        display.step(event)
                        if event.saves:
                            self.save(event.position, trace)
                    case EpochDone():
                        display.epoch(event)
                        self.recorder.epoch(event)
                        still = watch.settle(self.replica, self.channel, event.step, event.epoch)
                        if still is not None:
                            raise Concluded(still)
                        self.measure_distance(event)
                        if event.epoch % (self.config.checkpoint.every_epochs or event.epoch + 1) == 0:
                            self.save(event.position, trace)
                        self.check_reproduces(trace)
                    case Stopped():
                        self.stop(event, trace)
                if agreement.divergence is not None and self.explained is None:
                    self.explained = self.explain(agreement.divergence, agreement.reference_difference)
            self.report.warnings += self.checkpoints.finish()
            self.check_reproduces(trace)
        return self.finish(agreement)

    def open_trace(self) -> TraceWriter:
        """Rank 0's digests go into the run folder. A collective."""
        return self.world.together(self._open_trace)

    def _open_trace(self) -> TraceWriter:
        path = tensors = None
        if self.world.is_coordinator:
            path = self.recorder.folder / TRACE_NAME
            if self.config.agreement.record == "tensors":
                tensors = TensorRecord(self.recorder.folder / TENSORS_NAME)
        return TraceWriter(path, self.world.num_replicas, self.start.num_trace_lines, tensors, self.hasher.algorithm)

    def go_on(self) -> Start:
        """Where this run begins: at its beginning or, in the folder of an interrupted run, at its newest checkpoint."""
        shared = self.expect == "identical"
        section, folder = self.config.checkpoint, self.recorder.folder
        self.checkpoints = Checkpoints(section, self.world, self.replica, folder, shared)
        if not self.recorder.resumes:
            return Start()
        start = self.checkpoints.restore()
        self.recorder.resume(start.position.epoch)
        self.report.run.resumed_from = start.step
        self.report.run.skipped_checkpoints = [SkippedCheckpoint(**asdict(each)) for each in start.skipped]
        self.report.warnings += [f"skipped checkpoint {each}" for each in start.skipped]
        return start

    def save(self, position: Position, trace: TraceWriter) -> None:
        """Saves the state, unless replicas that should agree have parted."""
        agreement = self.agreement
        assert agreement is not None
        if agreement.divergence is None:
            self.checkpoints.save(position, self.coordinator.seed, agreement.steps_checked, trace.num_lines)

    def stop(self, event: Stopped, trace: TraceWriter) -> None:
        """Saves the state of a run that was told to stop: it can go on if that has worked."""
        self.save(event.position, trace)
        self.report.run.stopped_after = event.step
        self.stopped_with = ExitCode.STOPPED if self.checkpoints.newest_is_there() else ExitCode.FAILED

    def check_reproduces(self, trace: TraceWriter) -> None:
        """Raises Concluded if a run that goes on comes to something else than it had recorded before."""
        differing = self.channel.gather(trace.not_reproduced)[0]
        if differing is not None:
            raise Concluded(diagnosis.not_reproduced(*differing))

    def choose_hasher(self) -> Hasher:
        """Takes fingerprints on the device where that works on all replicas, so that all have digests of one kind."""
        hasher, algorithms = common_hasher([self.device.device], self.channel)
        if len(set(algorithms)) > 1:
            self.warnings.append(describe_fallback(algorithms))
        return hasher

    def make_agreement(self, trace: TraceWriter) -> Agreement:
        """Compares the build, too. Raises Divergence."""
        return Agreement(
            self.replica.model,
            self.replica.optimizer,
            others=[self.replica.scheduler, self.replica.scaler],
            expect=self.expect,
            every=self.config.agreement.every,
            on_divergence=self.config.agreement.on_divergence,
            lag=AGREEMENT_LAG,
            trace=trace,
            reference=self.referring.reference,
            channel=self.channel,
            steps_done=self.start.step,
            stoppable=True,
            hasher=self.hasher,
        )

    def make_history(self) -> History:
        """Snapshots from which a divergence can be replayed: where there is anything to compare."""
        compares = self.expect == "identical" and self.config.agreement.every > 0
        return History(self.replica, self.config.agreement.snapshot_every if compares else 0)

    def explain(self, found: Verdict, apart: ReferenceDifference | None = None) -> Verdict:
        """The verdict on a divergence, or a difference from the reference (`apart`), with its cause."""
        assert self.parts.seed is not None
        device, coordinator, injector = self.device.device, self.coordinator, self.injector
        explainer = Explainer(
            self.own, self.parts.seed, device, self.replica, self.data, coordinator, injector, self.channel, self.facts
        )
        if apart is not None:
            return explainer.explain_apart(found, self.referring.against(apart), self.agreement, self.history)
        return explainer.explain(found, self.agreement, self.history)

    def measure_distance(self, done: EpochDone) -> None:
        """Once replicas have parted and go on, records how far they are from each other."""
        if self.agreement is not None and self.agreement.divergence is not None and self.recorder.report is not None:
            distance = measure_distance(self.replica, self.channel)
            self.recorder.report.distance.append(DistanceRecord.of(done.epoch, distance))

    def finish(self, agreement: Agreement) -> Verdict:
        """The end of training: final fingerprints, and the spread if replicas are independent."""
        report = self.report
        report.set_fingerprints(agreement.fingerprints())
        report.run.last_step = agreement.steps_done
        for faults in self.channel.gather(self.injector.not_injected):
            due = [fault for fault in faults if fault.repeat or fault.step > self.start.step]
            report.warnings += [f"fault injection: not injected: {fault}" for fault in due]
        if self.expect == "independent" and report.epochs:
            evaluation = self.recorder.last_evaluation
            if evaluation is not None:  # a resumed run with no steps left has none
                report.spread = SpreadRecord(**measure_spread(evaluation, self.channel).as_dict())
        if agreement.divergence is not None:
            return self.explained or self.explain(agreement.divergence, agreement.reference_difference)
        differing = None if self.expect == "independent" else report.first_differing_result()
        if differing is not None:
            return diagnosis.results_differ(*differing)
        every = self.config.agreement.every
        steps = agreement.steps_checked if every else agreement.steps_done
        verdict = diagnosis.agreed(self.facts, steps, self.expect == "independent", compared=every > 0)
        verdict, warnings = self.referring.conclude(verdict, agreement.steps_done)
        report.warnings += warnings
        if report.run.stopped_after is not None:
            stopped = f"stopped on request after step {report.run.stopped_after}"
            verdict = verdict.with_(summary=f"{verdict.summary}; {stopped}")
        return verdict

    def open_record(self, anew: bool = False) -> None:
        """Opens the run folder: once there is something to keep, so that an unusable run leaves nothing behind."""
        self.recorder.open(self.facts.manifests, anew)
        self.report.warnings += [*self.warnings, *(f"fault injection: {fault}" for fault in self.config.inject)]
        self.report.skipped = SkippedSamples(count=len(self.parts.skipped), samples=self.parts.skipped)

    def conclude(self, verdict: Verdict) -> ExitCode:
        """Names the cause, writes the report, and says with what code to exit."""
        if self.recorder.report is None:
            self.open_record(anew=True)
        self.recorder.conclude(verdict, self.steps_checked)
        if verdict.cause == "none":
            return self.stopped_with or ExitCode.AGREED
        return ExitCode.DIVERGED

    @property
    def steps_checked(self) -> int:
        """Steps compared as they were taken; with `agreement.every` 0 only the final state is."""
        if self.agreement is None or self.config.agreement.every == 0:
            return 0
        return self.agreement.steps_checked

    def conclude_without(self, error: BaseException) -> list[Lost]:
        """Ends the record when this replica fails or (`ReplicaLost`) another is gone. Returns who is lost."""
        if self.world.monitor is not None and not isinstance(error, ReplicaLost):
            # At once: the launcher may end this process as soon as another one has learned of it and ended.
            traceback.print_exception(error)
            get_error_handler().record_exception(error)
        lost = find_lost_replicas(self.world.monitor, error)
        steps_done = None if self.agreement is None else self.agreement.steps_done
        self.recorder.conclude_without(lost, error, self.facts.manifests, steps_done, self.steps_checked)
        return lost
