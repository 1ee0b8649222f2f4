"""The records that `report.json` consists of."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=10**18)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Groups = list[list[int]]
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class Record(BaseModel):
    """A JSON object with known fields. Further ones are ignored."""

    model_config = ConfigDict(extra="ignore")


class SkippedCheckpoint(Record):
    """A checkpoint that could not be restored."""

    name: str
    replica: int
    code: str
    reason: str


class RunInfo(Record):
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


class ReplicaInfo(Record):
    """Host, device and seed of one replica."""

    replica: int
    host: str | None = None
    device: str | None = None
    seed: int | None = None


class NotCompared(Record):
    """Something that was not compared, and why."""

    code: str
    text: str


class Notice(Record):
    """A warning about what all replicas share, such as a loss of NaN."""

    code: str
    text: str
    data: dict[str, Any] = {}


class ReferenceCoverage(Record):
    """Comparison with a recorded run."""

    run: str
    steps: Count
    """Number of checked steps and evaluations compared with the recorded run."""
    stages: list[str] | None = None
    """Stages compared with the recorded run, in causal order. None if they are not known."""


class Coverage(Record):
    """The coverage of a run: the state that it compared, and the state that it did not."""

    steps_compared: Count
    ranks: Count
    """Number of ranks compared with each other."""
    every: Count
    """Interval of comparisons in steps, 0 for none."""
    stages: list[str]
    """Stages compared, in causal order."""
    reference: ReferenceCoverage | None = None
    not_compared: list[NotCompared] = []
    mesh: str | None = None
    """The axes of the device mesh with their sizes, such as `dp_replicate 2 x dp_shard 4`."""

    @property
    def has_second_copy(self) -> bool:
        """True if any state was compared with a second copy."""
        return bool(self.reference and self.reference.steps) or (self.ranks > 1 and bool(self.stages))


class OperatorRecord(Record):
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


class PathRecord(Record):
    """Differences from the first divergent operator to the end of its phase."""

    replicas: Annotated[list[int], Field(min_length=2, max_length=2)]
    num_operators: int
    operators: list[OperatorRecord]


class DivergenceRecord(Record):
    """Details of the divergent step."""

    stage_groups: dict[str, Groups] | None = None
    """Groups of replicas by stage, in causal order."""
    path: PathRecord | _Nothing | None = None


class ValueGroup(Record):
    """Replicas that reported the same number."""

    replicas: list[int]
    value: float | None
    """The number, or None if it is infinite or NaN."""


class EpochRecord(Record):
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


class Fingerprints(Record):
    """Final digests of one replica by stage, 32 hexadecimal digits each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    replica: int

    @property
    def digests(self) -> dict[str, str]:
        """Digests by stage."""
        return self.__pydantic_extra__


class SpreadRecord(Record):
    """Validation results of independent replicas."""

    n: int
    accuracy_mean: Amount
    accuracy_std: Amount | None
    disagreement: list[list[Amount]]
    ensemble_accuracy: Amount


class _Norms(Record):
    model_config = ConfigDict(extra="allow")
    l2: list[float | None]


class DistanceRecord(Record):
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


class SkippedSamples(Record):
    """Samples that could not be loaded and were left out (`data.on_error: skip`)."""

    count: int = 0
    samples: list[str] = []


def group_values(values: Sequence[float]) -> list[ValueGroup]:
    """Group replicas by equal value, in the order of their first replica. NaN equals NaN."""
    groups: dict[str, ValueGroup] = {}
    for replica_id, value in enumerate(values):
        groups.setdefault(repr(value), ValueGroup(replicas=[], value=value)).replicas.append(replica_id)
    return list(groups.values())


def _parts(train: Mapping[str, Any], val: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("train", train), ("val", val)
