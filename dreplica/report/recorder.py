"""Keeps the record of a run: the run folder while it goes, the report at every end it can have."""

import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dreplica.agreement.verdict import Verdict
from dreplica.diagnosis.conclude import replica_lost
from dreplica.report.run_report import RunReport, append_metrics, write_json
from dreplica.report.terminal import print_report
from dreplica.training.loop import EpochDone
from dreplica.world.process_group import World
from dreplica.world.roll_call import Lost, ReplicaLost
from dreplica.world.run_folder import create_run_folder

log = logging.getLogger(__name__)


class Recorder:
    """The record of one run. Every replica keeps the report, since any may have to write it."""

    def __init__(self, world: World, console: Console) -> None:
        self.report: RunReport | None = None
        self._world = world
        self._console = console
        self._started = time.monotonic()

    @property
    def folder(self) -> Path:
        """The run folder, once it is open."""
        assert self.report is not None, "open() comes first"
        return self.report.folder

    def open(self, root: str, name: str, expect: str, config_yaml: str, manifests: list[dict[str, Any]]) -> None:
        """Rank 0 makes the run folder and puts config and manifests in. A collective; raises UsageError on all."""
        make = self._world.together(lambda: create_run_folder(root, name) if self._world.is_coordinator else None)
        folder: Path = self._world.channel.gather(make)[0]
        replicas = [
            {
                "replica": replica_id,
                "host": manifest["host"],
                "device": manifest["device"]["name"],
                "seed": manifest["seed"],
            }
            for replica_id, manifest in enumerate(manifests)
        ]
        self.report = RunReport(name, folder, expect, replicas)
        if any(manifest["device"].get("shared") for manifest in manifests):
            self.report.warnings.append("replicas share a GPU: a fault of that GPU can reach all of them alike")
            log.warning(self.report.warnings[-1])
        if self._world.is_coordinator:
            (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
            write_json(
                folder / "manifest.json", [row | manifest for row, manifest in zip(replicas, manifests, strict=True)]
            )
            log.info("run folder: %s", folder)

    def epoch(self, done: EpochDone) -> None:
        """Keeps an epoch's results."""
        assert self.report is not None
        if self.report.epochs:
            # Only the last evaluation is needed whole, for the spread.
            self.report.epochs[-1] = self.report.epochs[-1].without_predictions()
        self.report.epochs.append(done)
        if self._world.is_coordinator:
            append_metrics(self.folder / "metrics.jsonl", done)

    def conclude(self, verdict: Verdict, steps_checked: int) -> None:
        """Rank 0 writes the report; all wait until it has, since the launcher ends the rest when the first ends."""
        if self._world.is_coordinator:
            self._write(verdict, steps_checked)
        self._world.channel.gather(None)

    def conclude_without(self, error: Exception, steps_done: int | None, steps_checked: int) -> None:
        """Ends the record when this replica fails with `error` or (`ReplicaLost`) another is gone.

        The first survivor writes the report, naming who was lost; rank 0 does when there is none. No collective.
        """
        lost = self._who_is_lost(error)
        gone = {item.replica_id for item in lost}
        survivors = [replica_id for replica_id in range(self._world.num_replicas) if replica_id not in gone]
        if self._world.replica_id == min(survivors, default=0):
            verdict = replica_lost(lost, steps_done, str(error))
            if self.report is None:
                log.error(verdict.summary)
            else:
                self._write(verdict, steps_checked)

    def _who_is_lost(self, error: Exception) -> list[Lost]:
        roll_call = self._world.roll_call
        reason = f"it raised {type(error).__name__}: {error}"
        if roll_call is None:
            return [Lost(0, reason)]
        if not isinstance(error, ReplicaLost):
            roll_call.report_failure(reason)
        return roll_call.take()

    def _write(self, verdict: Verdict, steps_checked: int) -> None:
        assert self.report is not None
        self.report.verdict = verdict
        self.report.seconds = time.monotonic() - self._started
        self.report.steps_checked = steps_checked
        write_json(self.folder / "report.json", self.report.as_dict())
        print_report(self._console, self.report)
