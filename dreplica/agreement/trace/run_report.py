"""The model of `report.json`, which writes and reads it.

The file has schema 2. Files of schema 1, as written before version 0.2, are converted when they are read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer
from pydantic_core import ErrorDetails

from dreplica.agreement.trace.json_file import write_json
from dreplica.agreement.trace.run_report_schema1 import upgrade_schema_1
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.errors import DreplicaError

SCHEMA = 2
REPORT_NAME = "report.json"

Count = Annotated[int, Field(ge=0, lt=10**18)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Groups = list[list[int]]
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class ReportError(DreplicaError):
    """A `report.json` that cannot be used.

    The code is one of `no-report` (there is no file), `damaged-report` (it cannot be read, or is not JSON),
    `not-a-report` (its fields have other types) and `newer-report` (written by a newer version).
    """

    default_code = "not-a-report"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore")


class SkippedCheckpoint(_Record):
    """A checkpoint that could not be restored."""

    name: str
    replica: int
    code: str
    reason: str


class RunInfo(_Record):
    """Identity and extent of a run."""

    name: str = ""
    folder: str = ""
    seconds: Amount | None = None
    resumed_from: int | None = None
    """Step from which the run resumed."""
    last_step: int | None = None
    """Last step taken, to which the fingerprints belong. None if training did not end."""
    stopped_after: int | None = None
    """Step after which the run stopped on request."""
    skipped_checkpoints: list[SkippedCheckpoint] = []


class ReplicaInfo(_Record):
    """Host, device and seed of one replica."""

    replica: int
    host: str | None = None
    device: str | None = None
    seed: int | None = None


class NotCompared(_Record):
    """Something that was not compared, and why."""

    code: str
    text: str


class ReferenceCoverage(_Record):
    """Comparison with a recorded run."""

    run: str
    steps: Count
    """Number of checked steps and evaluations compared with the recorded run."""


class Coverage(_Record):
    """What a run compared, and what it did not."""

    steps_compared: Count
    ranks: Count
    """Number of ranks compared with each other."""
    every: Count
    """Interval of comparisons in steps, 0 for none."""
    stages: list[str]
    """Stages compared, in causal order."""
    reference: ReferenceCoverage | None = None
    not_compared: list[NotCompared] = []

    @property
    def has_second_copy(self) -> bool:
        """True if any state was compared with a second copy."""
        return bool(self.reference and self.reference.steps) or (self.ranks > 1 and bool(self.stages))


class OperatorRecord(_Record):
    """Difference of one operator's results between two replays."""

    index: int
    operator: str
    module: str | None
    phase: str
    max_ulp: Annotated[int, Field(ge=0, le=2**64)] | None
    max_absolute: float | None
    relative: float | None
    num_differing: int
    num_compared: int
    num_elements: int


class PathRecord(_Record):
    """Differences from the first divergent operator to the end of its phase."""

    replicas: Annotated[list[int], Field(min_length=2, max_length=2)]
    num_operators: int
    operators: list[OperatorRecord]


class DivergenceRecord(_Record):
    """Details of the divergent step."""

    stage_groups: dict[str, Groups] | None = None
    """Groups of replicas by stage, in causal order."""
    path: PathRecord | _Nothing | None = None


class ValueGroup(_Record):
    """Replicas that reported the same number."""

    replicas: list[int]
    value: float | None
    """The number, or None if it is infinite or NaN."""


class EpochRecord(_Record):
    """Results of one epoch, each metric by groups of replicas."""

    epoch: Count
    train: dict[str, list[ValueGroup]] = {}
    val: dict[str, list[ValueGroup]] = {}
    seconds: float | None = Field(default=None, exclude=True)
    """Duration of the epoch, kept in memory only."""

    @classmethod
    def of(
        cls, epoch: int, train: Mapping[str, Sequence[float]], val: Mapping[str, Sequence[float]], seconds: float
    ) -> Self:
        """Return the record of an epoch from one value per replica.

        Args:
            epoch: Number of the epoch, from 1.
            train: Training metrics by name, one value per replica.
            val: Validation metrics by name, one value per replica.
            seconds: Duration of the epoch.
        """
        parts = {name: {key: group_values(row) for key, row in part.items()} for name, part in _parts(train, val)}
        return cls(epoch=epoch, seconds=seconds, **parts)

    def values(self, part: str, metric: str) -> list[float | None]:
        """Return one value per replica of a metric of `train` or `val`, or an empty list."""
        groups = getattr(self, part).get(metric, [])
        by_replica = {replica_id: group.value for group in groups for replica_id in group.replicas}
        return [by_replica[replica_id] for replica_id in sorted(by_replica)]


class Fingerprints(_Record):
    """Final digests of one replica by stage, 32 hexadecimal digits each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    replica: int

    @property
    def digests(self) -> dict[str, str]:
        """Digests by stage."""
        return self.__pydantic_extra__


class SpreadRecord(_Record):
    """Validation results of independent replicas."""

    n: int
    accuracy_mean: Amount
    accuracy_std: Amount | None
    disagreement: list[list[Amount]]
    ensemble_accuracy: Amount


class _Norms(_Record):
    model_config = ConfigDict(extra="allow")
    l2: list[float | None]


class DistanceRecord(_Record):
    """Distance of each replica from replica 0 at the end of an epoch, by stage."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Norms]

    epoch: Count

    @classmethod
    def of(cls, epoch: int, stages: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return the record of an epoch from the norms of each stage."""
        return cls.model_validate({"epoch": epoch, **stages})

    @property
    def l2(self) -> dict[str, list[float | None]]:
        """Euclidean norm of the difference from replica 0 by stage, one value per replica."""
        return {stage: norms.l2 for stage, norms in self.__pydantic_extra__.items()}


class SkippedSamples(_Record):
    """Samples that could not be loaded and were left out (`data.on_error: skip`)."""

    count: int = 0
    samples: list[str] = []


class RunReport(_Record):
    """The content of `report.json`. A run fills it as it proceeds."""

    run: RunInfo = Field(default_factory=RunInfo)
    expect: str = "identical"
    replicas: list[ReplicaInfo] = []
    steps_checked: Count = 0
    coverage: Coverage | None = None
    """What was compared. None in reports of schema 1."""
    verdict: Verdict | None = None
    divergence: DivergenceRecord | None = None
    epochs: list[EpochRecord] = []
    fingerprints: list[Fingerprints] = []
    spread: SpreadRecord | None = None
    distance: list[DistanceRecord] = []
    """Distances after a divergence, one record per epoch."""
    skipped: SkippedSamples = Field(default_factory=SkippedSamples)
    warnings: list[str] = []

    @field_serializer("verdict")
    def _serialize_verdict(self, verdict: Verdict | None) -> dict[str, Any] | None:
        return None if verdict is None else verdict.as_dict()

    def set_fingerprints(self, digests: Sequence[Mapping[str, str]]) -> None:
        """Set the final digests from one mapping of stages to digests per replica."""
        self.fingerprints = [Fingerprints(replica=index, **stages) for index, stages in enumerate(digests)]

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


def group_values(values: Sequence[float]) -> list[ValueGroup]:
    """Group replicas by equal value, in the order of their first replica. NaN equals NaN."""
    groups: dict[str, ValueGroup] = {}
    for replica_id, value in enumerate(values):
        groups.setdefault(repr(value), ValueGroup(replicas=[], value=value)).replicas.append(replica_id)
    return list(groups.values())


def describe(details: ErrorDetails) -> str:
    """Return the place and message of a validation error."""
    place = ".".join(map(str, details["loc"]))
    return f"{place}: {details['msg']}" if place else details["msg"]


def _parts(train: Mapping[str, Any], val: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("train", train), ("val", val)


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
