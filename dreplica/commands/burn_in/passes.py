"""One pass: a run like any other, of which nothing is kept unless something is found."""

import shutil
import time
from collections.abc import Sequence

from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.commands.burn_in.cards import PassDone
from dreplica.diagnosis.decision.conclude import replica_lost
from dreplica.distributed.liveness import Lost
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.run.bootstrap import Prepared
from dreplica.run.run import Run
from dreplica.training.events import Stopped


class Pass(Run):
    """A run that says nothing, and is not saved when it is told to stop: it is not to go on later."""

    def __init__(self, number: int, prepared: Prepared, world: World, stop_request: StopRequest) -> None:
        apply_determinism(prepared.own.determinism)  # the pass before may have changed flags
        super().__init__(prepared, world, stop_request)
        self.console.quiet = True
        self.number = number
        self._started = time.monotonic()

    def stop(self, event: Stopped, trace: TraceWriter) -> None:
        """Remembers that the pass was cut short."""
        self.report.run.stopped_after = event.step

    def done(self, verdict: Verdict, keep: bool) -> PassDone:
        """What came of it. Its folder stays if `keep`, with its report, and is removed otherwise. A collective."""
        if keep:
            self.conclude(verdict)
        elif self.recorder.report is not None and self.world.is_coordinator:
            shutil.rmtree(self.recorder.folder)
        self.recorder.close()
        return self._done(verdict, keep)

    def cut_off(self, lost: Sequence[Lost], noticed: BaseException) -> PassDone:
        """What came of it where replicas are gone, as far as this one knows. No collective."""
        report = self.recorder.report
        verdict = None if report is None else report.verdict  # one that was reached before stands
        kept = report is not None and self.recorder.folder.exists()
        return self._done(verdict or replica_lost(lost, None, str(noticed)), kept)

    def _done(self, verdict: Verdict, kept: bool) -> PassDone:
        report, agreement, agreed = self.recorder.report, self.agreement, verdict.cause == "none"
        return PassDone(
            number=self.number,
            seed=self.config.seed.model_dump(),
            complete=agreed and report is not None and report.run.stopped_after is None,
            steps=self.steps_checked,
            comparisons=0 if agreement is None else agreement.stages_compared,
            bytes_hashed=0 if agreement is None else agreement.bytes_hashed,
            seconds=time.monotonic() - self._started,
            weights=report.fingerprints[0].digests["weights"] if agreed and report is not None else None,
            verdict=verdict,
            warnings=[] if report is None else report.warnings,
            folder=str(self.recorder.folder) if kept else None,
        )
