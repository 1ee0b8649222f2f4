"""The base of every config section, and the messages a user sees when a value does not fit."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section: strict keys, strict types, immutable; the docstring beneath a field is its help."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class Lockstep:
    """Marks a field that replicas must share (`Annotated[int, Lockstep()]`): `overrides` cannot change it."""
