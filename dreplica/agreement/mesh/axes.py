"""The axes of a device mesh, and over which of them the values of a tensor are split.

A tensor is split over an axis if the ranks along it hold different parts of it by design. Ranks with equal coordinates
on all axes over which a tensor is split must hold the same bytes of it.
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor

from dreplica.distributed.rank_names import name_ranks

Split = frozenset[int]
"""The numbers of the axes over which a tensor is split."""


@dataclass(frozen=True)
class Copies:
    """The ranks that hold the same bytes of a tensor as this rank."""

    label: tuple[tuple[int, int], ...]
    """The axes over which the tensor is split, with this rank's coordinate on each. Equal on these ranks alone."""
    ranks: tuple[int, ...]
    """These ranks, in an order that is the same on all of them."""
    index: int
    """The position of this rank among them."""


@dataclass(frozen=True)
class Axes:
    """The place of one rank in a mesh of all ranks.

    Attributes:
        names: The names of the axes.
        sizes: The number of ranks along each axis.
        ranks: All ranks, in the order of the mesh: the last axis varies fastest.
        rank: This rank.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int

    @cached_property
    def coordinate(self) -> tuple[int, ...]:
        """The position of this rank on each axis."""
        return self.coordinate_of(self.rank)

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """Return the position of a rank on each axis."""
        place = self.ranks.index(rank)
        coordinate = []
        for size in reversed(self.sizes):
            place, position = divmod(place, size)
            coordinate.append(position)
        return tuple(reversed(coordinate))

    def copies(self, split: Split) -> Copies:
        """Return the ranks that hold the same bytes as this one of a tensor that is split over some axes."""
        label = tuple((axis, self.coordinate[axis]) for axis in sorted(split))
        ranks = self.along(set(range(len(self.sizes))) - split)
        return Copies(label, ranks, ranks.index(self.rank))

    def along(self, axes: Collection[int]) -> tuple[int, ...]:
        """Return the ranks that differ from this one in their coordinates on these axes only, in the mesh's order."""
        fixed = [axis for axis in range(len(self.sizes)) if axis not in axes]
        steps = [prod(self.sizes[axis + 1 :]) for axis in range(len(self.sizes))]
        places = [sum(self.coordinate[axis] * steps[axis] for axis in fixed)]
        for axis in sorted(axes):
            places = [place + position * steps[axis] for place in places for position in range(self.sizes[axis])]
        return tuple(self.ranks[place] for place in places)

    def find(self, ranks: Collection[int]) -> Split:
        """Return the axes along which these ranks, of which this one is one, are all that there are.

        The mesh of a tensor may be a part of the whole one, or have several of its axes flattened into one.

        Args:
            ranks: The ranks along one axis of the tensor's mesh.

        Returns:
            The numbers of the axes; none if the ranks are this one alone.

        Raises:
            LookupError: If these are not the ranks along any axes of this mesh.
        """
        wanted = set(ranks)
        for count in range(len(self.sizes) + 1):
            for axes in combinations(range(len(self.sizes)), count):
                if prod(self.sizes[axis] for axis in axes) == len(wanted) and set(self.along(axes)) == wanted:
                    return frozenset(axis for axis in axes if self.sizes[axis] > 1)
        raise LookupError(f"ranks {sorted(wanted)} are not those along any axes of the mesh {self}")

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


def axes_of(mesh: Any, rank: int, numbers: Mapping[int, int]) -> Axes:
    """Return the axes of a DeviceMesh.

    Args:
        mesh: The mesh, of all ranks that are compared.
        rank: The number of this rank among those that are compared.
        numbers: Rank of the job to its number among those that are compared.

    Raises:
        LookupError: If the mesh does not have exactly the ranks that are compared.
    """
    names = mesh.mesh_dim_names or tuple(f"axis{axis}" for axis in range(mesh.ndim))
    ranks = mesh.mesh.flatten().tolist()
    if sorted(ranks) != sorted(numbers):
        raise LookupError(f"the mesh has the {name_ranks(ranks)}, and the {name_ranks(numbers)} are compared")
    return Axes(tuple(names), tuple(mesh.mesh.shape), tuple(numbers[each] for each in ranks), rank)


def root_of(mesh: Any) -> Any:
    """Return the DeviceMesh that a mesh is a part of, or the mesh itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    device_mesh = importlib.import_module("torch.distributed.device_mesh")
    return device_mesh._mesh_resources.get_root_mesh(mesh)


class Splits:
    """The axes over which DTensors are split, by their meshes and placements.

    Args:
        axes: The mesh of all ranks.
        numbers: Rank of the job to its number in `axes`.
        partitioned: Axes along which ranks hold different tensors, such as pipeline stages.
    """

    def __init__(self, axes: Axes, numbers: Mapping[int, int], partitioned: Collection[str] = ()) -> None:
        self.axes, self._numbers = axes, numbers
        self.partitioned: Split = frozenset(axes.names.index(name) for name in partitioned)
        self._known: dict[tuple[int, tuple[Any, ...]], Split | None] = {}
        self._meshes: list[Any] = []

    def of(self, tensor: Any) -> Split | None:
        """Return the axes over which a DTensor is split, or None if its local values are parts of a sum.

        Raises:
            LookupError: If the DTensor's mesh is no part of the mesh of all ranks.
        """
        key = id(tensor.device_mesh), tensor.placements
        if key not in self._known:
            self._meshes.append(tensor.device_mesh)  # so that its id stays its own
            self._known[key] = self._find(tensor.device_mesh, tensor.placements)
        return self._known[key]

    def _find(self, mesh: Any, placements: Sequence[Any]) -> Split | None:
        split = set(self.partitioned)
        own = mesh.get_coordinate()
        for axis, placement in enumerate(placements):
            if placement.is_replicate():
                continue
            if placement.is_partial():
                return None
            line = mesh.mesh[tuple(slice(None) if i == axis else own[i] for i in range(mesh.ndim))]
            split |= self.axes.find([self._numbers.get(rank, -1) for rank in line.flatten().tolist()])
        return frozenset(split)


def is_sharded(value: Any) -> bool:
    """Return True for a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "placements")


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, without a node of autograd, once collectives in flight are complete."""
    part: Any = tensor._local_tensor
    if hasattr(part, "wait") and not isinstance(part, torch.nn.Parameter):
        part = part.wait()
    return part.detach()
