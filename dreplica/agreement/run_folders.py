"""The run folders of a comparison: the one that is recorded and the one that is compared with."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreplica.agreement.coverage import describe_coverage
from dreplica.agreement.recording import Recording
from dreplica.agreement.reference import Reference
from dreplica.agreement.trace.line import GENERATORS
from dreplica.agreement.trace.report_records import Coverage, ReferenceCoverage
from dreplica.agreement.trace.run_metadata import arguments_without, manifest_differences, read_run, show
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.channel import Channel
from dreplica.distributed.together import together
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import STAGES

_MOST_DIFFERENCES = 8
"""Differences between the environments of two runs that are named as evidence."""


class RunFolders:
    """The run folders of a comparison, which rank 0 reads and writes.

    Note:
        Collective: create it on every rank.

    Args:
        channel: The control channel between all ranks.
        record: Path of the folder to record into, or None. The same on every rank, as all arguments but `manifest`.
        reference: Path of the recorded run to compare with, or None.
        manifest: The manifest of this rank. It is exchanged if there is a folder.
        algorithm: Name of the hash functions of the digests.
        expect: What must agree.
        steps_done: Number of steps that a resumed run has taken before.

    Raises:
        SharedUsageError: On all ranks, if a folder cannot be used.

    Attributes:
        record: Path of the folder that is recorded, or None.
        reference: The recorded run, on rank 0, or None.
    """

    def __init__(
        self,
        channel: Channel,
        record: str | None,
        reference: str | None,
        manifest: Mapping[str, Any],
        algorithm: str,
        expect: str,
        steps_done: int,
    ) -> None:
        self.record = record
        self.reference: Reference | None = None
        self._reference_path = reference
        self._channel, self._expect = channel, expect
        self._recording: Recording | None = None
        self._environment: list[Evidence] = []
        if record is None and reference is None:
            return
        manifests = channel.gather(dict(manifest))

        def open_folders() -> None:
            if channel.rank == 0 and reference is not None:
                if record is not None and Path(record).resolve() == Path(reference).resolve():
                    raise UsageError(
                        f"record and reference are the same folder, {record!r}. Record into another one.",
                        code="same-folder",
                        argument="record",
                        value=record,
                    )
                self.reference = Reference(Path(reference), algorithm, resumed=steps_done > 0)
                own = [{**row, **arguments_without([record, reference], row)} for row in manifests]
                self._environment = _differences(self.reference.trace.path.parent, own)
            if channel.rank == 0 and record is not None:
                self._recording = Recording(Path(record), manifests, algorithm, expect, steps_done)

        together(channel, open_folders)

    @property
    def trace(self) -> TraceWriter | None:
        """The trace that is recorded, on rank 0."""
        return None if self._recording is None else self._recording.trace

    def check_repeated(self) -> None:
        """Warn once if a repeated step differs from what was recorded before the interruption."""
        if self._recording is not None:
            self._recording.check_repeated()

    def not_drawn(self) -> tuple[str, ...]:
        """Return the generators that a recorded run had not drawn from when it was interrupted, on all ranks.

        Note:
            Collective: call it on every rank.
        """
        own = GENERATORS if self.trace is None else self.trace.not_drawn
        return tuple(own if self.record is None else self._channel.gather(own)[0])

    def environment(self) -> list[Evidence]:
        """Return the differences between the environments of the recorded run and of this one, on all ranks.

        Note:
            Collective: call it on every rank.
        """
        return [] if self._reference_path is None else self._channel.gather(self._environment)[0]

    def equal_to_reference(self) -> tuple[int, Collection[str]] | None:
        """Return how many training steps and which stages are equal to the reference, on all ranks. None without one.

        Note:
            Collective: call it on every rank.
        """
        own = None if self.reference is None else (self.reference.num_steps, sorted(self.reference.stages))
        return None if self._reference_path is None else self._channel.gather(own)[0]

    def coverage(
        self,
        every: int,
        steps_checked: int,
        seen: Collection[str],
        planned: Collection[str],
        equal: tuple[int, Collection[str]] | None,
    ) -> Coverage:
        """Return what was compared.

        Args:
            every: Interval of comparisons in steps, 0 for none.
            steps_checked: Number of steps that were hashed.
            seen: Stages that were hashed at least once.
            planned: Stages to compare.
            equal: Number of training steps that are equal to the reference, and the stages. None without one.
        """
        reference = None
        if equal is not None:
            steps, stages = equal
            listed = [stage for stage in STAGES if stage in stages]
            reference = ReferenceCoverage(run=str(self._reference_path), steps=steps, stages=listed)
        return describe_coverage(self._channel.size, self._expect, every, steps_checked, reference, seen, planned)

    def conclude(
        self,
        verdict: Verdict,
        coverage: Coverage,
        steps_checked: int,
        last_step: int | None,
        digests: Sequence[Any] = (),
        warnings: Sequence[Evidence] = (),
    ) -> None:
        """Write the report of the recorded run, on rank 0.

        Args:
            verdict: The verdict.
            coverage: What was compared.
            steps_checked: Number of steps that were hashed.
            last_step: The step to which `digests` belong, or None if training did not end.
            digests: For each rank, stage name to the digest of its final state.
            warnings: Warnings about what all ranks share.
        """
        if self._recording is not None:
            self._recording.conclude(verdict, coverage, steps_checked, last_step, digests, warnings)

    def close(self) -> None:
        """Close the files."""
        if self._recording is not None:
            self._recording.close()


def _differences(folder: Path, manifests: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    """Return the differences between the environment of a recorded run and the one of these manifests."""
    recorded = read_run(folder).manifests
    rows = [] if recorded is None else manifest_differences(recorded, manifests)
    return [
        Evidence.of(
            "reference-field-differs",
            kind="environment",
            field=row.field,
            there=show(row.one),
            here=show(row.other),
        )
        for row in [row for row in rows if row.matters][:_MOST_DIFFERENCES]
    ]
