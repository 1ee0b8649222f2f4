"""The model of `report.json`, which writes and reads it.

The file has schema 2. Files of schema 1, as written before version 0.2, are converted when they are read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_serializer
from pydantic_core import ErrorDetails

from dreplica.agreement.trace.json_file import write_json
from dreplica.agreement.trace.report_records import (
    Count,
    Coverage,
    DistanceRecord,
    DivergenceRecord,
    EpochRecord,
    Fingerprints,
    Notice,
    Record,
    ReplicaInfo,
    RunInfo,
    SkippedSamples,
    SpreadRecord,
)
from dreplica.agreement.trace.run_report_schema1 import upgrade_schema_1
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.errors import DreplicaError

SCHEMA = 2
REPORT_NAME = "report.json"


class ReportError(DreplicaError):
    """A `report.json` that cannot be used.

    The code is one of `no-report` (there is no file), `damaged-report` (it cannot be read, or is not JSON),
    `not-a-report` (its fields have other types) and `newer-report` (written by a newer version).
    """

    default_code = "not-a-report"


class RunReport(Record):
    """The content of `report.json`. A run fills it as it proceeds."""

    run: RunInfo = Field(default_factory=RunInfo)
    expect: str = "identical"
    replicas: list[ReplicaInfo] = Field(default_factory=list)
    steps_checked: Count = 0
    coverage: Coverage | None = None
    """The coverage of the run. None in reports of schema 1."""
    verdict: Verdict | None = None
    divergence: DivergenceRecord | None = None
    epochs: list[EpochRecord] = Field(default_factory=list)
    fingerprints: list[Fingerprints] = Field(default_factory=list)
    spread: SpreadRecord | None = None
    distance: list[DistanceRecord] = Field(default_factory=list)
    """Distances after a divergence, one record per epoch."""
    skipped: SkippedSamples = Field(default_factory=SkippedSamples)
    warnings: list[str] = Field(default_factory=list)
    """All warnings as text."""
    notices: list[Notice] = Field(default_factory=list)
    """The warnings about what all replicas share, as data. Their texts are also in `warnings`."""

    @field_serializer("verdict")
    def _serialize_verdict(self, verdict: Verdict | None) -> dict[str, Any] | None:
        return None if verdict is None else verdict.as_dict()

    def set_fingerprints(self, digests: Sequence[Mapping[str, str]]) -> None:
        """Set the final digests from one mapping of stages to digests per replica."""
        self.fingerprints = [Fingerprints(replica=index, **stages) for index, stages in enumerate(digests)]

    def set_notices(self, warnings: Sequence[Evidence]) -> None:
        """Set the warnings about what all replicas share, and add their texts to all warnings."""
        self.notices = [Notice(**each.as_dict()) for each in warnings]
        self.warnings += [each.text for each in warnings if each.text not in self.warnings]

    def conclude(self, verdict: Verdict) -> None:
        """Set the verdict and the details of its divergence."""
        self.verdict = verdict
        self.divergence = None
        if verdict.stage_groups:
            self.divergence = DivergenceRecord.model_validate(
                {"stage_groups": verdict.stage_groups, "path": verdict.path}
            )

    def first_differing_result(self) -> tuple[int, str, list[float]] | None:
        """Return epoch, metric and values of the first epoch whose results differ between replicas."""
        for record in self.epochs:
            for part, name in (("train", "training"), ("val", "validation")):
                for metric, groups in getattr(record, part).items():
                    if len(groups) > 1:
                        values = [math.nan if value is None else value for value in record.values(part, metric)]
                        return record.epoch, f"{name} {metric}", values
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values in the order of the schema."""
        return {"schema": SCHEMA, **self.model_dump()}

    def write(self, folder: Path) -> None:
        """Write `report.json` into a run folder, completely or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_json(folder / REPORT_NAME, self.as_dict())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `report.json` of a run folder.

        Raises:
            ReportError: There is no such file, or it is not a report.
        """
        content = _load(folder / REPORT_NAME)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ReportError(f"{REPORT_NAME} is not a run report: {describe(error.errors()[0])}") from None

    @classmethod
    def read_valid_parts(cls, folder: Path) -> tuple[Self, list[str]]:
        """Read `report.json`, leaving out the fields that are not valid.

        Returns:
            The report, and a description of the first problem of each field left out.

        Raises:
            ReportError: There is no such file, or it holds no JSON object.
        """
        content = _load(folder / REPORT_NAME)
        try:
            return cls.model_validate(content), []
        except ValidationError as error:
            problems = {details["loc"][0]: describe(details) for details in reversed(error.errors())}
        valid = {key: value for key, value in content.items() if key not in problems}
        return cls.model_validate(valid), list(problems.values())


def describe(details: ErrorDetails) -> str:
    """Return the place and message of a validation error."""
    place = ".".join(map(str, details["loc"]))
    return f"{place}: {details['msg']}" if place else details["msg"]


def _load(path: Path) -> dict[str, Any]:
    """Load a report as JSON values of the current schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"there is no {path.name}", code="no-report") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ReportError(f"{path.name} cannot be read: {reason}", code="damaged-report") from None
    if not isinstance(content, dict):
        raise ReportError(f"{path.name} is not a run report: expected an object, got {type(content).__name__}")
    schema = content.pop("schema", None)
    if schema == 1:
        return upgrade_schema_1(content)
    if schema == SCHEMA:
        return content
    if isinstance(schema, int) and schema > SCHEMA:
        raise ReportError(
            f"{path.name} has schema {schema}, expected {SCHEMA} or lower. Upgrade dreplica.", code="newer-report"
        )
    raise ReportError(f"{path.name} is not a run report: invalid schema={schema!r}: expected 1 or {SCHEMA}")
