"""The base class of config sections."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section with strict keys, strict types and immutable values.

    The docstring below a field is its help text.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class Lockstep:
    """A mark for a field that replicas must share and `overrides` cannot change: `Annotated[int, Lockstep()]`."""
