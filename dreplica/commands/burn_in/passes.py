"""One pass of a burn-in: a training run whose record is removed unless something was found."""

import shutil
import time
from collections.abc import Sequence

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.commands.burn_in.cards import PassDone
from dreplica.diagnosis.decision.lost_replicas import replica_lost
from dreplica.distributed.liveness.lost import Lost
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.run.bootstrap import Prepared
from dreplica.run.run import Run


class Pass:
    """One pass of a burn-in, on one replica.

    The run prints nothing, and saves no checkpoint when it is stopped, since no later pass resumes it.

    Args:
        number: The number of the pass, from 1.
        prepared: The config of this pass, and the device of this replica.
        world: All replicas.
        stop_request: Set when the pass has to stop.

    Attributes:
        run: The training run.
    """

    def __init__(self, number: int, prepared: Prepared, world: World, stop_request: StopRequest) -> None:
        apply_determinism(prepared.own.determinism)  # the pass before may have changed flags
        self.run = Run(prepared, world, stop_request, resumable=False)
        self.run.console.quiet = True
        self._number = number
        self._started = time.monotonic()

    def done(self, verdict: Verdict, keep: bool) -> PassDone:
        """End the pass and return its result.

        Args:
            verdict: The verdict that the run reached.
            keep: Keep the run folder, with its report. It is removed otherwise.

        Note:
            Collective: call on every rank.
        """
        recorder = self.run.recorder
        if keep:
            self.run.conclude(verdict)
        elif recorder.report is not None and self.run.world.is_coordinator:
            shutil.rmtree(recorder.folder)
        recorder.close()
        return self._done(verdict, keep)

    def cut_off(self, lost: Sequence[Lost], noticed: BaseException) -> PassDone:
        """Return the result of a pass in which replicas were lost, as far as this replica knows it.

        Args:
            lost: The replicas that were lost.
            noticed: The exception that ended the pass on this replica.
        """
        report = self.run.recorder.report
        verdict = None if report is None else report.verdict  # a verdict reached before the loss is kept
        kept = report is not None and self.run.recorder.folder.exists()
        return self._done(verdict or replica_lost(lost, None, noticed), kept)

    def _done(self, verdict: Verdict, kept: bool) -> PassDone:
        run = self.run
        report, agreement, agreed = run.recorder.report, run.agreement, verdict.cause == "none"
        return PassDone(
            number=self._number,
            seed=run.config.seed.model_dump(),
            complete=agreed and report is not None and report.run.stopped_after is None,
            steps=run.steps_checked,
            comparisons=0 if agreement is None else agreement.stages_compared,
            bytes_hashed=0 if agreement is None else agreement.bytes_hashed,
            seconds=time.monotonic() - self._started,
            weights=report.fingerprints[0].digests["weights"] if agreed and report is not None else None,
            verdict=verdict,
            warnings=[] if report is None else report.warnings,
            folder=str(run.recorder.folder) if kept else None,
        )
