"""What one run of a step left on a replica, and where two runs of it differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements
from dreplica.state.replica import Parts
from dreplica.state.snapshot import Snapshot
from dreplica.state.walk import MODEL, OPTIMIZER, StateWalk
from dreplica.training.original import Footprint


@dataclass(frozen=True)
class Aftermath:
    """What one run of a step left on a replica. What is not known is left out."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Stage, such as `weights`, to the tensors of the stage by name. Tensors stay on their device."""
    generators: Mapping[str, Tensor | bytes | None] = field(default_factory=dict)
    """State of each global generator, named and packed as in the stage `rng`."""
    own_generators: Mapping[str, Any] = field(default_factory=dict)
    """State of each generator that a module or optimizer holds, by path."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Plain attributes of modules and optimizers and entries of schedulers, by path."""
    nodes: int | None = None
    """Autograd nodes that the step made."""
    writes: Mapping[str, int] = field(default_factory=dict)
    """Steps of version counters by name: of parameters, buffers, optimizer state, batch, outputs and gradients."""


@dataclass(frozen=True)
class Change:
    """The entries of one stage in which two runs of a step differ."""

    stage: str
    """The stage."""
    names: Sequence[str]
    """The entries that differ."""
    total: int
    """Number of entries of the stage."""
    differences: Mapping[str, Difference | str]
    """How they differ, for those whose tensors are known on both sides. A text if shape or dtype differ."""

    @property
    def bits(self) -> int | None:
        """Number of bits that differ. None if it is unknown, or if a tensor has another shape."""
        found = [self.differences.get(name) for name in self.names]
        known = [each.differing_bits for each in found if isinstance(each, Difference)]
        return sum(known) if len(known) == len(found) else None

    @property
    def elements(self) -> int:
        """Number of elements that are known to differ."""
        return sum(each.num_differing for each in self.differences.values() if isinstance(each, Difference))

    @property
    def reshaped(self) -> bool:
        """True if a tensor has another shape or dtype."""
        return any(isinstance(each, str) for each in self.differences.values())


def compare_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Difference | str]:
    """Compare tensors of the same name element by element.

    Args:
        one: Tensors of one run of the step by name.
        other: Tensors of another run by name.

    Returns:
        How those that differ do, in the order of `one`. A text if shape or dtype differ.
    """
    found: dict[str, Difference | str] = {}
    for name, tensor in one.items():
        if name not in other:
            continue
        there = other[name]
        if tensor.shape != there.shape or tensor.dtype != there.dtype:
            found[name] = (
                f"{tensor.dtype} {tuple(tensor.shape)} on one side, {there.dtype} {tuple(there.shape)} on the other"
            )
            continue
        difference = compare_elements(tensor.cpu(), there.cpu())
        if difference is not None:
            found[name] = difference
    return found


def stage_tensors(snapshot: Snapshot) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a snapshot by stage and name: weights, buffers, gradients and optimizer."""
    stages: dict[str, dict[str, Tensor]] = {"weights": {}, "buffers": {}, "optimizer": {}}
    for name, kept in snapshot.tensors.items():
        root, _, rest = name.partition(".")
        if root == OPTIMIZER:
            stages["optimizer"][rest] = kept.values
        else:
            stage = "weights" if isinstance(kept.tensor, nn.Parameter) else "buffers"
            stages[stage][rest if root == MODEL else name] = kept.values
    gradients = {name.removeprefix(f"{MODEL}."): each for name, each in snapshot.gradients.items() if each is not None}
    return {**stages, "gradients": gradients}


def plain_values(replica: Parts, snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return plain attributes and private generators in a snapshot, by path.

    Args:
        replica: The replica, with the modules and optimizers that it had when the snapshot was taken.
        snapshot: The snapshot.
    """
    values, generators = snapshot.plain.leaves(StateWalk(replica).owners)
    for number, state in enumerate(snapshot.others):  # a scheduler's state
        values |= {
            f"others.{number}.{key}": value for key, value in state.items() if isinstance(value, bool | int | float)
        }
    return values, generators


def writes_of(footprint: Footprint, current: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the steps of version counters by name, without tensors that were replaced by others meanwhile.

    Args:
        footprint: The counters that a step moved.
        current: The tensors after the step, by name.
    """
    rows = zip(footprint.tensors.items(), footprint.writes, strict=True)
    held = {name: count for (name, tensor), count in rows if current.get(name) is tensor}
    return {**held, **footprint.passing}
