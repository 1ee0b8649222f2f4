"""The declared settings that can explain a divergence, and their match with the groups of replicas."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreplica.diagnosis.evidence.observation import OpDifference, Witness
from dreplica.state.stages import STAGES

Overrides = Mapping[int, Mapping[str, Any]]
"""Replica id, section and key of what an override changes."""

_NOT_READ_BY_REPLAYS = {"run", "agreement", "checkpoint", "inject", "data.num_workers", "world.timeout"}
_CHANGES_AN_OPERATOR = {
    "determinism",
    "world.device",
    "train.amp",
    "model.name",
    "model.factory",
    "model.compile",
    "model.channels_last",
    "replica.factory",
}
"""Sections and keys that can change an operator's result for equal inputs and arguments: rounding, memory layout, and
user code."""
CHANGES_CODE = {"model.factory", "replica.factory", "data.name"}
"""Keys that name code of the user, which may do anything."""
_ONLY_ROUNDS = "determinism."
"""Section of settings that change how operators round, and no values that they are given."""
_READ_AFTER_BACKWARD = {"optim", "schedule", "train.grad_clip"}
_READ_UNTIL_BACKWARD = {"data", "criterion"}


def settings_behind(
    overrides: Overrides, witnesses: Sequence[Witness], place: OpDifference | None, stage: str | None
) -> dict[int, dict[str, Any]]:
    """Select the declared settings that can explain a divergence.

    If replicas began the step in the same state, settings of the optimizer act after the backward pass only, and those
    of the data before it.

    Args:
        overrides: The config's declared differences.
        witnesses: The observations of each replica, by replica id.
        place: The operator at which replicas diverge, if one is found.
        stage: The first stage that differs.

    Returns:
        Replica id to dotted key to value.
    """
    found: dict[int, dict[str, Any]] = {}
    for replica_id, partial in overrides.items():
        flat = {f"{section}.{key}": value for section, values in partial.items() for key, value in values.items()}
        kept = {key: value for key, value in flat.items() if _can_part(key, witnesses, place, stage)}
        if kept:
            found[replica_id] = kept
    return found


def divides_as(values: Sequence[str], groups: Sequence[Sequence[int]]) -> bool:
    """Return True if replicas with equal values are always in the same group."""
    group_of = {replica_id: number for number, ids in enumerate(groups) for replica_id in ids}
    numbers: dict[str, set[int]] = {}
    for replica_id, value in enumerate(values):
        numbers.setdefault(value, set()).add(group_of[replica_id])
    return all(len(found) == 1 for found in numbers.values())


def overridden(settings: Mapping[int, Any], groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the replicas of those groups in which every replica declares a difference."""
    return sorted(r for ids in groups if all(r in settings for r in ids) for r in ids)


def _can_part(key: str, witnesses: Sequence[Witness], place: OpDifference | None, stage: str | None) -> bool:
    if _is_one_of(key, _NOT_READ_BY_REPLAYS):
        return False
    if place is not None and place.made_here:
        return _is_one_of(key, _CHANGES_AN_OPERATOR)
    if len({witness.contents.before for witness in witnesses}) > 1 or stage is None:
        return True  # a setting may have acted in a step before, which was not compared
    if place is not None and place.same_structure and key.startswith(_ONLY_ROUNDS):
        return False  # it would show as an operator that makes the difference from the same call
    after = place.record.phase == "optimizer" if place is not None else STAGES.index(stage) > STAGES.index("output")
    return not _is_one_of(key, _READ_UNTIL_BACKWARD if after else _READ_AFTER_BACKWARD)


def _is_one_of(key: str, names: set[str]) -> bool:
    """Return True if the dotted key or its whole section is in `names`."""
    return key in names or key.partition(".")[0] in names
