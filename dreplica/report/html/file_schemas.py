"""Types of the files in a run folder that the page reads, except `report.json`.

Another program may have written or changed these files, so the page validates them.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dreplica.agreement.trace.report_records import Amount, Count
from dreplica.agreement.trace.run_report import describe


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Part(_Shape):
    loss: list[float | None] = []
    accuracy: list[Amount] = []


class _Epoch(_Shape):
    epoch: Count
    train: _Part
    val: _Part
    timing: dict[str, list[Amount]] = {}


class _Config(_Shape):
    run: dict[str, Any] | None = None
    overrides: dict[Any, dict[Any, dict[Any, Any] | None]] | None = None


class _Manifest(_Shape):
    device: dict[str, Any] | None = None


CONFIG, EPOCH, MANIFESTS = (TypeAdapter[Any](shape) for shape in (_Config, _Epoch, list[_Manifest]))


def check(value: Any, shape: TypeAdapter[Any]) -> Any:
    """Return a value that has the expected types.

    Raises:
        ValueError: It has other types. The text names the first place.
    """
    try:
        shape.validate_python(value)
    except ValidationError as error:
        raise ValueError(describe(error.errors()[0])) from None
    return value


def split_off_invalid(value: dict[str, Any], shape: TypeAdapter[Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the valid entries, and a description of the first problem of each other entry."""
    try:
        shape.validate_python(value)
    except ValidationError as error:
        places = {details["loc"][0]: describe(details) for details in reversed(error.errors())}
        return {key: item for key, item in value.items() if key not in places}, list(places.values())
    return value, []
