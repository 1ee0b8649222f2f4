"""A training run of one replica: prepare, build, train, conclude."""

import logging
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dreplica.agreement.agreement import Agreement
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
from dreplica.distributed.liveness.lost import Lost, ReplicaLost, exit_code_of
from dreplica.distributed.liveness.monitor import find_lost_replicas
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.errors import ExitCode, UsageError
from dreplica.report.record.recorder import Recorder
from dreplica.report.record.terminal import ProgressDisplay, Screen
from dreplica.report.record.trackers import check_trackers
from dreplica.run.bootstrap import Prepared, exit_now, start_replica
from dreplica.run.reference_run import ReferenceRun
from dreplica.run.session import Concluded, Session
from dreplica.state.progress import Position
from dreplica.training.checkpoint.manager import Checkpoints, Start
from dreplica.training.events import EpochDone, StepDone, Stopped
from dreplica.training.history import History
from dreplica.training.seed_spread import measure_spread

log = logging.getLogger(__name__)


def run_worker(argv: Sequence[str]) -> ExitCode:
    """Run one replica of a training run, from its command line to its exit code."""
    return start_replica(argv, lambda prepared, world, stop_request: Run(prepared, world, stop_request).conduct())


class Run:
    """One replica of a training run.

    The methods are defined in the order in which they are called.

    Args:
        prepared: The config and the device of this replica.
        world: All replicas.
        stop_request: Set when this replica is asked to stop.
        resumable: Save a checkpoint when the run is stopped, so that the same command resumes it.
    """

    def __init__(self, prepared: Prepared, world: World, stop_request: StopRequest, resumable: bool = True) -> None:
        self.config, self.world, self.channel = prepared.config, world, world.channel
        self.resumable = resumable
        self.session = Session(prepared, world, stop_request)
        self.expect, self.facts = self.session.expect, self.session.facts
        self.agreement: Agreement | None = None
        self.history: History | None = None
        self.explained: Verdict | None = None
        self.start = Start()
        self.stopped_with: ExitCode | None = None
        self.console = Screen()
        run, every = self.config.run, self.config.agreement.every
        name, report = str(run.name), self.config.report
        self.recorder = Recorder(world, self.console, run, name, self.expect, self.config.to_yaml(), report, every)

    @property
    def report(self) -> RunReport:
        """The report, once the run folder is open."""
        assert self.recorder.report is not None
        return self.recorder.report

    def conduct(self) -> ExitCode:
        """Run to the end. However the run ends on one replica, it ends on all of them."""
        try:
            return self.conclude(self.reach_verdict())
        except UsageError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            lost = self.conclude_failed(error)
            if self.world.monitor is not None:
                exit_now(exit_code_of(lost))
            raise

    def reach_verdict(self) -> Verdict:
        """Prepare, build and train, and diagnose a divergence.

        Note:
            Collective: call on every rank.
        """
        session = self.session
        try:
            check = partial(check_trackers, self.config.report)
            self.world.together(check if self.world.is_coordinator else lambda: None)
            session.choose_hasher()
            self.reference_run = ReferenceRun(self.config, self.world, session.hasher.algorithm)
            self.recorder.reference = self.reference_run.coverage
            session.prepare()
            self.open_record()
            self.reference_run.compare_settings(self.recorder.folder, self.facts.manifests)
            self.start = self.resume()
            session.open_index_stream(session.data_seed if self.start.data_seed is None else self.start.data_seed)
            return self.train()
        except Concluded as end:
            return end.verdict
        except ReferenceDiffers as difference:
            return self.explain(difference.verdict, difference.difference)
        except Divergence as divergence:
            return self.explain(divergence.verdict)

    def open_record(self, new_folder: bool = False) -> None:
        """Open the run folder.

        It is opened only when there is something to record, so that an unusable run leaves nothing behind.
        """
        self.recorder.open(self.facts.manifests, new_folder)
        faults = [f"fault injection: {fault}" for fault in self.config.inject]
        self.report.warnings += [*self.session.warnings, *faults]
        self.recorder.announced += faults
        skipped = self.session.skipped
        self.report.skipped = SkippedSamples(count=len(skipped), samples=skipped)

    def resume(self) -> Start:
        """Return where training begins: at the newest checkpoint of an interrupted run, or at the first step."""
        shared = self.expect == "identical"
        section, folder = self.config.checkpoint, self.recorder.folder
        self.checkpoints = Checkpoints(section, self.world, self.session.replica, folder, shared)
        if not self.recorder.resumes:
            return Start()
        start = self.checkpoints.restore()
        self.recorder.resume(start.position.epoch)
        self.report.run.resumed_from = start.step
        self.report.run.skipped_checkpoints = [SkippedCheckpoint(**asdict(each)) for each in start.skipped]
        self.report.warnings += [f"skipped checkpoint {each}" for each in start.skipped]
        return start

    def train(self) -> Verdict:
        """Train to the end and return the verdict.

        Raises:
            Divergence: Replicas diverge, and `agreement.on_divergence` is `stop`.
            ReferenceDiffers: This run diverges from its reference.
            Concluded: The model does not learn, or a resumed run does not reproduce what it had recorded.
        """
        session = self.session
        kept = len(session.data.train) if session.own.data.cache != "none" else 0  # type: ignore[arg-type]
        display = ProgressDisplay(self.console, self.world.is_coordinator, self.expect, kept)
        watch = LearningWatch(session.replica, settled=self.start.step > 0)
        with closing(display), self.open_trace() as trace:
            if trace.num_missing:
                self.report.warnings.append(f"trace.jsonl lacks its last {trace.num_missing} lines: it has a gap")
            agreement = self.agreement = session.compare(trace, self.reference_run.reference, self.start.step)
            agreement.steps_checked = self.start.steps_checked
            history = self.history = session.keep_history()
            for event in session.steps(agreement, history, self.start.position):
                match event:
                    case StepDone():
                        display.step(event)
                        if event.saves:
                            self.save(event.position, trace)
                    case EpochDone():
                        display.epoch(event)
                        self.recorder.epoch(event)
                        not_learning = watch.settle(session.replica, self.channel, event.step, event.epoch)
                        if not_learning is not None:
                            raise Concluded(not_learning)
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
        """Open the trace, which rank 0 writes into the run folder.

        Note:
            Collective: call on every rank.
        """
        return self.world.together(self._open_trace)

    def _open_trace(self) -> TraceWriter:
        path = tensors = None
        if self.world.is_coordinator:
            path = self.recorder.folder / TRACE_NAME
            if self.config.agreement.record == "tensors":
                tensors = TensorRecord(self.recorder.folder / TENSORS_NAME)
        algorithm = self.session.hasher.algorithm
        return TraceWriter(path, self.world.num_replicas, self.start.num_trace_lines, tensors, algorithm)

    def save(self, position: Position, trace: TraceWriter) -> None:
        """Save a checkpoint, unless replicas have diverged."""
        agreement = self.agreement
        assert agreement is not None
        if agreement.divergence is None:
            seed = self.session.coordinator.seed
            self.checkpoints.save(position, seed, agreement.steps_checked, trace.num_lines)

    def stop(self, event: Stopped, trace: TraceWriter) -> None:
        """Record that the run was stopped, and save a checkpoint if the run is resumable."""
        self.report.run.stopped_after = event.step
        if self.resumable:
            self.save(event.position, trace)
            self.stopped_with = ExitCode.STOPPED if self.checkpoints.newest_is_there() else ExitCode.FAILED

    def check_reproduces(self, trace: TraceWriter) -> None:
        """Raise Concluded if a resumed run produces other digests than the interrupted run had recorded."""
        differing = self.channel.gather(trace.not_reproduced)[0]
        if differing is not None:
            raise Concluded(diagnosis.not_reproduced(*differing))

    def measure_distance(self, done: EpochDone) -> None:
        """Record how far replicas that have diverged are from each other."""
        if self.agreement is not None and self.agreement.divergence is not None and self.recorder.report is not None:
            distance = measure_distance(self.session.replica, self.channel)
            self.recorder.report.distance.append(DistanceRecord.of(done.epoch, distance))

    def explain(self, found: Verdict, difference: ReferenceDifference | None = None) -> Verdict:
        """Diagnose a divergence, or a difference from the reference run, and return the verdict."""
        explainer = self.session.explainer()
        if difference is not None:
            return explainer.explain_reference(
                found, self.reference_run.known(difference), self.agreement, self.history
            )
        return explainer.explain(found, self.agreement, self.history)

    def finish(self, agreement: Agreement) -> Verdict:
        """Record the final fingerprints and the seed spread, and return the verdict."""
        report, injector = self.report, self.session.injector
        assert injector is not None
        report.set_fingerprints(agreement.fingerprints())
        report.run.last_step = agreement.steps_done
        due = [str(fault) for fault in injector.not_injected if fault.repeat or fault.step > self.start.step]
        for faults in self.channel.gather(due):
            report.warnings += [f"fault injection: not injected: {fault}" for fault in faults]
        if self.expect == "independent" and report.epochs:
            evaluation = self.recorder.last_evaluation
            if evaluation is not None:  # None if a resumed run had no epoch left to evaluate
                report.spread = SpreadRecord(**measure_spread(evaluation, self.channel).as_dict())
        if agreement.divergence is not None:
            return self.explained or self.explain(agreement.divergence, agreement.reference_difference)
        differing = None if self.expect == "independent" else report.first_differing_result()
        if differing is not None:
            return diagnosis.results_differ(*differing)
        every = self.config.agreement.every
        steps = agreement.steps_checked if every else agreement.steps_done
        verdict = diagnosis.agreed(self.facts, steps, self.expect == "independent", compared=every > 0)
        verdict, warnings = self.reference_run.conclude(verdict, agreement.steps_done)
        report.warnings += warnings
        if report.run.stopped_after is not None:
            stopped = f"stopped on request after step {report.run.stopped_after}"
            verdict = verdict.with_(summary=f"{verdict.summary}; {stopped}")
        return verdict

    def conclude(self, verdict: Verdict) -> ExitCode:
        """Write the report with the verdict, and return the exit code."""
        if self.recorder.report is None:
            self.open_record(new_folder=True)
        self.record_notices()
        self.recorder.conclude(verdict, self.steps_checked, self.stages_seen)
        if verdict.cause == "none":
            return self.stopped_with or ExitCode.AGREED
        return ExitCode.DIVERGED

    def record_notices(self) -> None:
        """Write the warnings about what all replicas share, which are logged already, into the report."""
        if self.agreement is not None and self.recorder.report is not None:
            self.recorder.report.set_notices(self.agreement.warnings)
            self.recorder.announced += [each.text for each in self.agreement.warnings]

    @property
    def steps_checked(self) -> int:
        """Number of steps compared. With `agreement.every` 0 only the final state is, and the number is 0."""
        if self.agreement is None or self.config.agreement.every == 0:
            return 0
        return self.agreement.steps_checked

    @property
    def stages_seen(self) -> set[str] | None:
        """Stages compared at least once, or None where only a part of the run is known."""
        if self.config.agreement.every == 0 or self.start.step > 0:
            return None
        return set() if self.agreement is None else self.agreement.stages_seen

    def conclude_failed(self, error: BaseException) -> list[Lost]:
        """Write the report after this replica failed or, on `ReplicaLost`, another one.

        Returns:
            The replicas that are lost.
        """
        if self.world.monitor is not None and not isinstance(error, ReplicaLost):
            # At once: the launcher may kill this process as soon as another replica has noticed and exited.
            traceback.print_exception(error)
            get_error_handler().record_exception(error)
        lost = find_lost_replicas(self.world.monitor, error)
        self.record_notices()
        steps_done = None if self.agreement is None else self.agreement.steps_done
        seen = self.stages_seen
        self.recorder.conclude_without(lost, error, self.facts.manifests, steps_done, self.steps_checked, seen)
        return lost
