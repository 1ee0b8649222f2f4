"""The run folder that a custom loop records (`record=`), which rank 0 writes."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreplica.agreement.arguments import invalid_argument
from dreplica.agreement.trace.folder_lock import FolderLock
from dreplica.agreement.trace.json_file import write_json
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME, Trace
from dreplica.agreement.trace.report_records import Coverage, ReplicaInfo, RunInfo
from dreplica.agreement.trace.run_metadata import manifest_differences, read_run, show
from dreplica.agreement.trace.run_report import REPORT_NAME, RunReport
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"

_FILES = (TRACE_NAME, TENSORS_NAME, MANIFEST_NAME, REPORT_NAME)


class Recording:
    """A run folder in progress: manifest, trace, digests per tensor, and the report once there is a verdict.

    Args:
        folder: Path of the run folder. It is created, or continued if `steps_done` is above 0.
        manifests: The manifest of each rank.
        algorithm: Name of the hash functions of the digests.
        expect: What must agree: `identical`, `independent` or `ddp`.
        steps_done: Number of steps that a resumed run has taken before. Recorded steps after it are repeated: they are
            compared with their record.

    Raises:
        UsageError: If the folder holds a recorded run that is not continued, or cannot be written.

    Attributes:
        folder: Path of the run folder.
        trace: The trace, to which checked steps are appended.
    """

    def __init__(
        self, folder: Path, manifests: Sequence[Mapping[str, Any]], algorithm: str, expect: str, steps_done: int
    ) -> None:
        self.folder = folder
        self._started = time.monotonic()
        self._report = RunReport(
            run=RunInfo(name=folder.name, folder=str(folder), resumed_from=steps_done or None),
            expect=expect,
            replicas=[_describe(rank, manifest) for rank, manifest in enumerate(manifests)],
        )
        self._is_warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(folder)
            if self._lock.taken:
                raise _in_use(folder)
            try:
                self._open(manifests, algorithm, steps_done)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            text = f"record: {str(folder)!r} cannot be written: {error.strerror}. Pass a folder that you can write to."
            raise invalid_argument("record", str(folder), text, code="cannot-record") from None

    def _open(self, manifests: Sequence[Mapping[str, Any]], algorithm: str, steps_done: int) -> None:
        """Open the trace, and replace the manifest of an interrupted run."""
        num_lines = _claim(self.folder, steps_done)
        tensors = TensorRecord(self.folder / TENSORS_NAME)
        self.trace = TraceWriter(self.folder / TRACE_NAME, len(manifests), num_lines, tensors, algorithm)
        now = [{"replica": rank, **row} for rank, row in enumerate(manifests)]
        before = read_run(self.folder).manifests if steps_done else None
        for row in [] if before is None else manifest_differences(before, json.loads(json.dumps(now))):
            if row.matters and row.field != "argv":  # such as --resume
                text = f"{row.field} was {show(row.one)} before the interruption, and is {show(row.other)} now"
                self._warn(f"record: {text}")
        write_json(self.folder / MANIFEST_NAME, now)

    def check_repeated(self) -> None:
        """Warn once if a repeated step differs from what was recorded before the interruption."""
        found = self.trace.not_reproduced
        if found is None or self._is_warned:
            return
        self._is_warned = True
        step, stage = found
        self._warn(
            f"record: step {step}, which {str(self.folder)!r} had recorded before the interruption, differs now: "
            f"{stage}. The resumed run does not continue the interrupted one exactly, and the later results count"
        )

    def _warn(self, text: str) -> None:
        log.warning(text)
        self._report.warnings.append(text)

    def conclude(
        self,
        verdict: Verdict,
        coverage: Coverage,
        steps_checked: int,
        last_step: int | None,
        fingerprints: Sequence[Mapping[str, str]] = (),
        warnings: Sequence[Evidence] = (),
    ) -> None:
        """Write `report.json`.

        Args:
            verdict: The verdict so far.
            coverage: What was compared, and what was not.
            steps_checked: Number of steps that were hashed and recorded.
            last_step: The step to which `fingerprints` belong, or None if training did not end.
            fingerprints: For each rank, stage name to the digest of its final state.
            warnings: Warnings about what all ranks share.
        """
        self._report.conclude(verdict)
        self._report.set_notices(warnings)
        self._report.coverage = coverage
        self._report.steps_checked = steps_checked
        self._report.run.last_step = last_step
        self._report.run.seconds = round(time.monotonic() - self._started, 1)
        self._report.set_fingerprints(fingerprints)
        self._report.write(self.folder)

    def close(self) -> None:
        """Close the trace, and release the folder."""
        try:
            self.trace.close()
        finally:
            self._lock.release()


def _claim(folder: Path, steps_done: int) -> int:
    """Begin the trace of a run folder, or return the number of lines of its trace that belong to the steps done.

    Raises:
        UsageError: If the folder holds a recorded run that is not continued.
        OSError: If it cannot be created.
    """
    trace = folder / TRACE_NAME
    if steps_done and trace.exists():
        return Trace(folder).num_lines_until(steps_done)
    existing = [name for name in _FILES if (folder / name).exists()]
    if not existing:
        try:
            trace.touch(exist_ok=False)
        except FileExistsError:
            existing = [TRACE_NAME]
        else:
            return 0
    raise _exists(folder, existing[0], steps_done)


def _in_use(folder: Path) -> UsageError:
    text = f"record: {str(folder)!r} is in use: another process records into it. Pass another folder, or end it first."
    return invalid_argument("record", str(folder), text, code="record-in-use")


def _exists(folder: Path, name: str, steps_done: int) -> UsageError:
    fix = "Pass another folder, or delete this one."
    if not steps_done and name == TRACE_NAME:
        fix = "Pass another folder, delete this one, or pass steps_done=N to continue it after step N."
    text = f"record: {str(folder)!r} already holds a recorded run ({name}). {fix}"
    return invalid_argument("record", str(folder), text, code="already-recorded")


def _describe(rank: int, manifest: Mapping[str, Any]) -> ReplicaInfo:
    device = manifest.get("device") or {}
    return ReplicaInfo(replica=rank, host=manifest.get("host"), device=device.get("name"), seed=manifest.get("seed"))
