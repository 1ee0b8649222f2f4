"""Record a run: its folder during the run, its report however it ends."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dreplica.agreement.coverage import describe_coverage
from dreplica.agreement.trace.folder_lock import FolderLock
from dreplica.agreement.trace.json_file import write_json
from dreplica.agreement.trace.report_records import EpochRecord, ReferenceCoverage, ReplicaInfo, RunInfo
from dreplica.agreement.trace.run_report import REPORT_NAME, RunReport
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import ReportConfig, RunFolderConfig
from dreplica.diagnosis.decision.lost_replicas import replica_lost
from dreplica.distributed.failure import describe_exception
from dreplica.distributed.liveness.lost import Lost, is_reporter
from dreplica.distributed.process_group import World
from dreplica.environment.manifest import card_of
from dreplica.errors import UsageError
from dreplica.report.html.render import FILE_NAME, write_report
from dreplica.report.record.closing_report import print_report
from dreplica.report.record.metrics import METRICS_NAME, append_metrics, losses_not_finite, read_metrics
from dreplica.report.record.resumable import claim_folder, manifest_changes
from dreplica.report.record.resume_remedy import resume_remedy
from dreplica.report.record.run_folder import create_run_folder
from dreplica.report.record.run_log import LOG_NAME, RunLog
from dreplica.report.record.trackers import Trackers
from dreplica.training.evaluate import Evaluation
from dreplica.training.events import EpochDone

log = logging.getLogger(__name__)


class Recorder:
    """The record of one run.

    Every replica keeps the report, since any of them may have to write it.

    Args:
        world: All replicas.
        console: The console that the closing report is printed to.
        config: The section `run` of the config.
        name: Name of the run.
        expect: `identical` or `independent`, as in `agreement.expect`.
        config_yaml: The resolved config, written to `config.yaml`.
        trackers: The section `report` of the config.
        every: Interval of comparisons in steps, as in `agreement.every`.
    """

    def __init__(
        self,
        world: World,
        console: Console,
        config: RunFolderConfig,
        name: str,
        expect: str,
        config_yaml: str,
        trackers: ReportConfig,
        every: int = 1,
    ) -> None:
        self.report: RunReport | None = None
        self.resumes = False
        """True if this run resumes an interrupted one in its folder."""
        self.reference: Callable[[], ReferenceCoverage | None] = lambda: None
        """Function that returns the extent of the comparison with a recorded run, or None without one."""
        self.announced: list[str] = []
        """Warnings of the report that were printed at the start, which the closing report does not repeat."""
        self.last_evaluation: Evaluation | None = None
        """This replica's predictions of the last epoch."""
        self._every = every
        self._lock: FolderLock | None = None
        self._log: RunLog | None = None
        self._trackers_config = trackers
        self._trackers: Trackers | None = None
        self._recorded_epochs = 0
        self._warned_of_losses = False
        self._world = world
        self._console = console
        self._config, self._name, self._expect, self._config_yaml = config, name, expect, config_yaml
        self._started = time.monotonic()

    @property
    def folder(self) -> Path:
        """Path of the run folder, once it is open."""
        assert self.report is not None, "call open() first"
        return Path(self.report.run.folder)

    def open(self, manifests: Sequence[Mapping[str, Any]], new_folder: bool = False) -> None:
        """Create the run folder with config and manifests, or open that of an interrupted run.

        Args:
            manifests: Manifest of each replica. Empty if the run ends before they are known.
            new_folder: True to create a new folder in any case. A run that ends before its first step must not write
                into the folder of another run.

        Raises:
            SharedUsageError: The folder cannot be created.

        Note:
            Collective: call on every rank.
        """
        may_resume = self._config.resume == "auto" and not new_folder
        find = partial(self._claim_folder, may_resume, manifests[0]["data"] if manifests else None)
        own = self._world.together(find if self._world.is_coordinator else lambda: None)
        folder, self.resumes = self._world.channel.gather(own)[0]
        self._begin(folder, manifests)
        if self._world.is_coordinator:
            if self.resumes:
                self._compare_manifests(manifests)
            else:
                self._write_inputs(manifests)
            self._trackers = Trackers(self._trackers_config, folder, self._name, yaml.safe_load(self._config_yaml))

    def resume(self, epoch: int) -> None:
        """Restore the results of the epochs before `epoch` from the interrupted run.

        Note:
            Collective: call on every rank.
        """
        assert self.report is not None
        done = read_metrics(self.folder / METRICS_NAME) if self._world.is_coordinator else None
        done = self._world.channel.gather(done)[0]
        self._recorded_epochs = max((item.epoch for item in done), default=0)
        self.report.epochs = [_record(item) for item in done if item.epoch < epoch]
        missing = sorted(set(range(1, epoch)) - {item.epoch for item in done})
        if missing:
            self.report.warnings.append(f"epochs {missing} are missing in metrics.jsonl and in this report")

    def _claim_folder(self, may_resume: bool, data_digest: str | None) -> tuple[Path, bool]:
        claimed = claim_folder(self._config.root, self._name, self._config_yaml, data_digest, may_resume)
        folder, resumes, self._lock = claimed
        return folder, resumes

    def _compare_manifests(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Warn if the interrupted run had another environment, which can change results."""
        assert self.report is not None
        log.info("run folder: %s", self.folder)
        try:
            changes = manifest_changes(self.folder, manifests[0])
        except (OSError, ValueError, LookupError) as error:
            log.warning("manifest.json of %s cannot be read: %s", self.folder, error)
            return
        for line in changes:
            self.report.warnings.append(line)
            log.warning(line)

    def _begin(self, folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        replicas = [ReplicaInfo(replica=replica_id) for replica_id in range(self._world.num_replicas)]
        for row, manifest in zip(replicas, manifests, strict=False):
            row.host, row.device, row.seed = manifest["host"], manifest["device"]["name"], manifest["seed"]
        run = RunInfo(name=self._name, folder=str(folder))
        self.report = RunReport(run=run, expect=self._expect, replicas=replicas)
        if self._world.is_coordinator:
            self._log = self._open_log()
        cards = [(manifest["host"], card) for manifest in manifests if (card := card_of(manifest)) is not None]
        if len(set(cards)) < len(cards):
            self.report.warnings.append("replicas share a GPU: a fault of that GPU can affect all of them equally")
            if self._world.is_coordinator:
                log.warning(self.report.warnings[-1])

    def _open_log(self) -> RunLog | None:
        try:
            return RunLog(self.folder)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.folder / LOG_NAME, error)
            return None

    def _write_inputs(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        assert self.report is not None
        (self.folder / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
        rows = [{"replica": replica_id, **manifest} for replica_id, manifest in enumerate(manifests)]
        write_json(self.folder / "manifest.json", rows)
        log.info("run folder: %s", self.folder)

    def epoch(self, done: EpochDone) -> None:
        """Record the results of an epoch."""
        assert self.report is not None
        self.last_evaluation = done.evaluation  # only the last one is needed, for the spread
        self.report.epochs.append(_record(done))
        self._warn_of_losses(done)
        if self._world.is_coordinator and done.epoch > self._recorded_epochs:
            append_metrics(self.folder / METRICS_NAME, done)
            if self._trackers is not None:
                self._trackers.epoch(done)

    def _warn_of_losses(self, done: EpochDone) -> None:
        """Warn once of losses that are infinite or NaN, on which replicas may agree."""
        assert self.report is not None
        warning = losses_not_finite(done)
        if warning is None or self._warned_of_losses:
            return
        self._warned_of_losses = True
        self.report.warnings.append(warning)
        if self._world.is_coordinator:
            log.warning(warning)

    def conclude(self, verdict: Verdict, steps_checked: int, stages_seen: Collection[str] | None = None) -> None:
        """Write the report on rank 0.

        Args:
            verdict: The verdict on the run.
            steps_checked: Number of steps compared between replicas.
            stages_seen: Stages compared at least once, or None if that is not known.

        Note:
            Collective: call on every rank. All ranks wait for rank 0, since the launcher ends the other processes when
            the first one ends.
        """
        self._complete(verdict, steps_checked, stages_seen)
        if self._world.is_coordinator:
            self._write()
        self._world.channel.gather(None)

    def conclude_without(
        self,
        lost: Sequence[Lost],
        error: BaseException,
        manifests: Sequence[Mapping[str, Any]],
        steps_done: int | None,
        steps_checked: int,
        stages_seen: Collection[str] | None = None,
    ) -> None:
        """Write the report after a failure, on one surviving replica and without communication.

        A verdict that was reached before is kept.

        Args:
            lost: The replicas that were lost.
            error: The exception of this replica, or `ReplicaLost` if another one failed.
            manifests: Manifest of each replica. Empty if they are not known yet.
            steps_done: Number of steps that this replica has taken, or None before training.
            steps_checked: Number of steps compared between replicas.
            stages_seen: Stages compared at least once, or None if that is not known.
        """
        if not is_reporter(lost, self._world.replica_id, self._world.num_replicas):
            return
        if self.report is not None and self.report.verdict is not None:
            if not (self.folder / REPORT_NAME).exists():
                self._write()
            return
        known = [item.step for item in lost if item.step is not None]
        if steps_done is not None:
            # This replica noticed the loss in its newest step: the comparison of the step before never completed.
            steps_done = min(known, default=max(steps_done - 1, 0))
        verdict = replica_lost(lost, steps_done, error)
        if self.report is None:
            try:
                self._begin(create_run_folder(self._config.root, self._name), manifests)
            except UsageError as problem:
                log.error("%s; the report cannot be written: %s", verdict.summary, problem)
                return
            self._write_inputs(manifests)
        if not all(item.code == "unusable" for item in lost):
            verdict = verdict.with_(remedy=[*verdict.remedy, resume_remedy(self.folder, self._config.resume)])
        self._complete(verdict, steps_checked, stages_seen)
        self._write()

    def close(self) -> None:
        """Release the run folder, for a process that continues with another run."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None and not self._lock.taken:
            self._lock.release()

    def _complete(self, verdict: Verdict, steps_checked: int, stages_seen: Collection[str] | None) -> None:
        assert self.report is not None
        self.report.conclude(verdict)
        self.report.run.seconds = round(time.monotonic() - self._started, 1)
        self.report.steps_checked = steps_checked
        self.report.coverage = describe_coverage(
            self._world.num_replicas, self._expect, self._every, steps_checked, self.reference(), stages_seen
        )

    def _write(self) -> None:
        """Write the report to the terminal, then to the run folder, and continue if one of them fails.

        The terminal is first: a file system whose server does not respond can block forever.
        """
        assert self.report is not None
        try:
            print_report(self._console, self.report, self.announced)
        except OSError as error:
            log.error("the report could not be printed: %s", error)
        try:
            self.report.write(self.folder)
        except OSError as error:
            log.error("%s could not be written: %s", self.folder / REPORT_NAME, error)
        try:
            write_report(self.folder)
        except Exception as error:  # no failure to write the page changes the end of the run
            log.warning("%s could not be written: %s", self.folder / FILE_NAME, describe_exception(error))
        if self._trackers is not None:
            self._trackers.close(self.report.verdict)


def _record(done: EpochDone) -> EpochRecord:
    return EpochRecord.of(done.epoch, done.train, done.val, done.seconds)
