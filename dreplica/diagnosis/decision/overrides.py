"""Which of the declared differences can have parted replicas at a place, and whether they divide them as it does."""

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
"""What can change an operator's result though its inputs, as digests see them, and its other arguments are the same:
how numbers are rounded, how tensors lie in memory, and code of the user's own."""

_READ_AFTER_BACKWARD = {"optim", "schedule", "train.grad_clip"}
_READ_UNTIL_BACKWARD = {"data", "criterion"}


def settings_behind(
    overrides: Overrides, witnesses: Sequence[Witness], place: OpDifference | None, stage: str | None
) -> dict[int, dict[str, Any]]:
    """Those declared settings that can have parted replicas at `place`, which first shows in `stage`.

    Replica id to dotted key to value. Where replicas began the step alike, the optimizer's settings act after the
    backward pass only, and those of the data before it.
    """
    found: dict[int, dict[str, Any]] = {}
    for replica_id, partial in overrides.items():
        flat = {f"{section}.{key}": value for section, values in partial.items() for key, value in values.items()}
        kept = {key: value for key, value in flat.items() if _can_part(key, witnesses, place, stage)}
        if kept:
            found[replica_id] = kept
    return found


def divides_as(values: Sequence[str], groups: Sequence[Sequence[int]]) -> bool:
    """Whether replicas with equal values are in one class, and not all replicas have the same value."""
    group_of = {replica_id: number for number, ids in enumerate(groups) for replica_id in ids}
    numbers: dict[str, set[int]] = {}
    for replica_id, value in enumerate(values):
        numbers.setdefault(value, set()).add(group_of[replica_id])
    return all(len(found) == 1 for found in numbers.values())


def overridden(settings: Mapping[int, Any], groups: Sequence[Sequence[int]]) -> list[int]:
    """The groups of which every replica declares a difference: one that agrees with an unchanged one is no suspect."""
    return sorted(r for ids in groups if all(r in settings for r in ids) for r in ids)


def _can_part(key: str, witnesses: Sequence[Witness], place: OpDifference | None, stage: str | None) -> bool:
    if _is_one_of(key, _NOT_READ_BY_REPLAYS):
        return False
    if place is not None and place.made_here:
        return _is_one_of(key, _CHANGES_AN_OPERATOR)
    if len({witness.contents.before for witness in witnesses}) > 1 or stage is None:
        return True  # a setting may have acted in a step before, which was not compared
    after = place.record.phase == "optimizer" if place is not None else STAGES.index(stage) > STAGES.index("output")
    return not _is_one_of(key, _READ_UNTIL_BACKWARD if after else _READ_AFTER_BACKWARD)


def _is_one_of(key: str, names: set[str]) -> bool:
    """Whether the dotted key, or its section as a whole, is among `names`."""
    return key in names or key.partition(".")[0] in names
