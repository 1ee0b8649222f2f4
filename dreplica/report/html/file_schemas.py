"""What the page takes for granted of the files in a run folder, which something else may have written, or changed."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

Number = Annotated[int, Field(ge=0, lt=10**18)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Classes = list[list[int]]
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Part(_Shape):
    loss: list[float | None] = []
    accuracy: list[Amount] = []


class _Epoch(_Shape):
    epoch: Number
    train: _Part
    val: _Part
    timing: dict[str, list[Amount]] = {}


class _Run(_Shape):
    seconds: Amount | None = None
    last_step: int | None = None
    stopped_after: int | None = None


class _Verdict(_Shape):
    step: int | None = None
    stage: str | None = None
    suspects: list[int] | None = None
    classes: Classes | None = None
    evidence: list[Any] | None = None
    remedy: list[Any] | None = None


class _Operator(_Shape):
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


class _Path(_Shape):
    replicas: Annotated[list[int], Field(min_length=2, max_length=2)]
    num_operators: int
    operators: list[_Operator]


class _Divergence(_Shape):
    stage_classes: dict[str, Classes] | None = None
    path: _Path | _Nothing | None = None


class _Fingerprints(_Shape):
    replica: int
    weights: str = ""
    buffers: str = ""


class _Spread(_Shape):
    n: int
    accuracy_mean: Amount
    accuracy_std: Amount | None
    disagreement: list[list[Amount]]
    ensemble_accuracy: Amount


class _Norms(_Shape):
    l2: list[float | None]


class _Distance(_Shape):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Norms]

    epoch: Number


class _Skipped(_Shape):
    count: int = 0
    samples: list[Any] = []


class _Report(_Shape):
    run: _Run | None = None
    replicas: list[dict[str, Any]] | None = None
    steps_checked: int | None = None
    verdict: _Verdict | None = None
    divergence: _Divergence | None = None
    epochs: list[_Epoch] | None = None
    fingerprints: list[_Fingerprints] | None = None
    spread: _Spread | None = None
    distance: list[_Distance] | None = None
    skipped: _Skipped | None = None
    warnings: list[Any] | None = None


class _Config(_Shape):
    run: dict[str, Any] | None = None
    overrides: dict[Any, dict[Any, dict[Any, Any] | None]] | None = None


class _Manifest(_Shape):
    device: dict[str, Any] | None = None


class _Header(_Shape):
    replicas: Annotated[int, Field(gt=0)] = 1


class _Step(_Shape):
    step: Number
    epoch: Number | None
    agreed: bool


REPORT, CONFIG, EPOCH, MANIFESTS, HEADER, STEP = (
    TypeAdapter[Any](shape) for shape in (_Report, _Config, _Epoch, list[_Manifest], _Header, _Step)
)


def check(value: Any, shape: TypeAdapter[Any]) -> Any:
    """The value. Raises ValueError, naming the first place where it has another shape."""
    try:
        shape.validate_python(value)
    except ValidationError as error:
        raise ValueError(_describe(error.errors()[0])) from None
    return value


def split_off_misshapen(value: dict[str, Any], shape: TypeAdapter[Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries that have their shape, and where each of the others has not."""
    try:
        shape.validate_python(value)
    except ValidationError as error:
        places = {details["loc"][0]: _describe(details) for details in reversed(error.errors())}
        return {key: item for key, item in value.items() if key not in places}, list(places.values())
    return value, []


def _describe(details: ErrorDetails) -> str:
    place = ".".join(map(str, details["loc"]))
    return f"{place}: {details['msg']}" if place else details["msg"]
