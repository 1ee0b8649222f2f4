"""Merging of partial configs, and the rules for what replicas may override."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dreplica.config.base import Lockstep
from dreplica.config.messages import config_error


def merge(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `partial`, recursively.

    A `criterion`, `optim` or `schedule` that gets another name keeps none of the old arguments except `lr`.
    """
    merged = dict(base)
    for key, value in partial.items():
        old = merged.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            merged[key] = value
        elif key in {"criterion", "optim", "schedule"} and value.get("name", old.get("name")) != old.get("name"):
            merged[key] = {**({"lr": old["lr"]} if "lr" in old else {}), **value}
        else:
            merged[key] = merge(old, value)
    return merged


def check_override(prefix: str, base: BaseModel, own: BaseModel) -> None:
    """Check that one replica's config differs from the base only where it may.

    Args:
        prefix: Dotted key of the override, such as `overrides.1`.
        base: The config without overrides.
        own: The config with this replica's overrides.

    Raises:
        UsageError: A shared key (`Lockstep`) differs.
    """
    for section, field in type(base).model_fields.items():
        for name, item in getattr(field.annotation, "model_fields", {}).items():
            value, shared = getattr(getattr(own, section), name), getattr(getattr(base, section), name)
            if any(isinstance(mark, Lockstep) for mark in item.metadata) and value != shared:
                raise config_error(
                    "shared-key",
                    f"{prefix}.{section}.{name}",
                    f"expected {shared!r} as on the other replicas, got {value!r}",
                    f"Set {section}.{name} instead, since replicas must share this value.",
                    value=value,
                    expected=shared,
                )
