"""The keys that a user has chosen, rather than a default or a packaged config.

They are in `model_fields_set` of each section.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from dreplica.config.base import Section


def given_keys(config: BaseModel) -> set[str]:
    """Return the dotted keys of sections that were chosen, such as `model.name`."""
    sections = {name: value for name, value in config if isinstance(value, Section)}
    return {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields_set}


def dotted_keys(values: Mapping[str, Any]) -> set[str]:
    """Return the keys of a partial config: those of each section as `section.key`, and `inject` and `overrides`."""
    keys: set[str] = set()
    for name, value in values.items():
        is_section = isinstance(value, Mapping) and name != "overrides"
        keys |= {f"{name}.{key}" for key in value} if is_section else {name}
    return keys


def keep_given(config: BaseModel, chosen: Iterable[str]) -> None:
    """Make `model_fields_set` of each section hold only the keys that were chosen.

    What is checked later, when the data are loaded and the replica is built, reads it.
    """
    kept = set(chosen)
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            given = section.model_fields_set
            given.intersection_update([key for key in given if f"{name}.{key}" in kept])
