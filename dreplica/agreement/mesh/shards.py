"""The parts of a replica's state that one rank of a mesh holds, and where they differ from other ranks' copies."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from torch import Tensor

from dreplica.agreement.arguments import invalid_argument
from dreplica.agreement.mesh.axes import Copies, Split, Splits, axes_of, is_sharded, local, root_of
from dreplica.agreement.subject import Subject
from dreplica.agreement.trace.report_records import Coverage, NotCompared
from dreplica.agreement.verdict.location import Place, first_difference
from dreplica.agreement.verdict.names import list_names
from dreplica.config.messages import nearest
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint.stage import STAGES, Stage
from dreplica.state.stages import Entry, named_weights

EntrySplits = Mapping[str, Sequence[Split]]
"""Stage to the axes over which each of its entries is split, in the order of the entries."""
Label = tuple[tuple[int, int], ...]
"""The axes over which a tensor is split, with a coordinate on each: it names the ranks that hold copies."""
_DIGEST = 16


@dataclass(frozen=True)
class Located:
    """The first place on a mesh where copies of a tensor differ."""

    place: Place
    """Stage, tensor and groups. Only ranks that hold copies of the tensor are in the groups."""
    shard: dict[str, int]
    """The axes over which the tensor is split, with the coordinate of the part that differs."""
    others: list[dict[str, int]]
    """The other parts of tensors of this stage that differ between their copies."""


class Shards:
    """The parts of tensors that this rank holds, and which other ranks hold copies of each.

    Args:
        splits: The axes over which DTensors are split.
        parameters: Returns the model's parameters by name.
    """

    def __init__(self, splits: Splits, parameters: Callable[[], Mapping[str, Tensor]]) -> None:
        self.axes = splits.axes
        self._splits, self._parameters = splits, parameters
        self._of_names: dict[str, Split] = {}
        self._copies: dict[Split, Copies] = {}
        self.partial: set[str] = set()
        """Stage and name of the tensors that are parts of sums."""
        self.counts: dict[str, tuple[int, int]] = {}
        """Stage to the number of entries with a second copy, and the number of all entries, when last read."""

    def parts(self, stages: Mapping[str, Iterable[Entry]]) -> tuple[dict[str, Iterable[Entry]], EntrySplits]:
        """Return the entries of stages with this rank's part in place of each DTensor.

        Parts of a sum (`Partial`) are left out.

        Returns:
            The entries by stage, and the axes over which each is split, which are known once the entries are read.
        """
        parameters = {name: each for name, each in self._parameters().items() if is_sharded(each)}
        splits: dict[str, list[Split]] = {stage: [] for stage in stages}
        parts = {stage: self._parts(stage, each, parameters, splits[stage]) for stage, each in stages.items()}
        return parts, splits  # type: ignore[return-value]  # iterators are iterable

    def _parts(
        self, stage: str, entries: Iterable[Entry], parameters: Mapping[str, Any], splits: list[Split]
    ) -> Iterator[Entry]:
        for name, value in entries:
            split: Split | None
            if is_sharded(value):
                split, value = self._splits.of(value), local(value)
            else:
                split = self._of_owner(name, parameters)
            if split is None:
                self.partial.add(f"{stage} {name}")
                continue
            splits.append(split)
            yield name, value
        with_copy = sum(len(self.copies(split).ranks) > 1 for split in splits)
        self.counts[stage] = with_copy, len(splits)

    def _of_owner(self, name: str, parameters: Mapping[str, Any]) -> Split:
        """Return the split of a plain tensor: that of the parameter that its name begins with, if there is one."""
        if name not in self._of_names:
            path = name.split(".")
            prefixes = (".".join(path[start:end]) for start in (0, 1) for end in range(len(path) - 1, start, -1))
            owner = next((parameters[prefix] for prefix in prefixes if prefix in parameters), None)
            split = None if owner is None else self._splits.of(owner)
            self._of_names[name] = self._splits.partitioned if split is None else split
        return self._of_names[name]

    def not_compared(self) -> list[NotCompared]:
        """Return which tensors have no second copy, and which are parts of sums."""
        missing = [
            f"{total - with_copy} of {total} entries of {stage}"
            for stage, (with_copy, total) in self.counts.items()
            if with_copy < total
        ]
        lines = []
        if missing:
            text = f"split over all axes of the mesh ({self.axes}), so without a second copy: {', '.join(missing)}"
            lines.append(NotCompared(code="no-second-copy", text=text))
        if self.partial:
            text = f"parts of sums (Partial), which differ by design: {list_names(sorted(self.partial))}"
            lines.append(NotCompared(code="partial", text=text))
        return lines

    def cover(self, coverage: Coverage) -> Coverage:
        """Return the coverage of a run with the mesh and what of it is not compared."""
        lines = [*coverage.not_compared, *self.not_compared()]
        return coverage.model_copy(update={"mesh": str(self.axes), "not_compared": lines})

    def has_copies(self, stage: str) -> bool:
        """Return True if any entry of a stage has a second copy."""
        return self.counts.get(stage, (0, 0))[0] > 0

    def copies(self, split: Split) -> Copies:
        """Return the ranks that hold the same part as this one of a tensor that is split over these axes."""
        if split not in self._copies:
            self._copies[split] = self.axes.copies(split)
        return self._copies[split]

    def digests(self, step: int, stages: Mapping[str, Stage], splits: EntrySplits) -> list[tuple[Copies, bytes]]:
        """Return one digest for each set of copies, over the step and all entries that belong to it.

        Args:
            step: The step.
            stages: The digests of the stages.
            splits: The axes over which each entry is split.
        """
        start = step.to_bytes(8, "little")
        rows: dict[Split, xxhash.xxh3_128] = {frozenset(): xxhash.xxh3_128(start)}
        for stage, each in stages.items():
            for split, part in _by_split(each, splits[stage]).items():
                row = rows.setdefault(split, xxhash.xxh3_128(start))
                row.update(stage.encode() + b"\0" + part.digest)
        return [(self.copies(split), row.digest()) for split, row in rows.items()]

    def locate(
        self, channel: Channel, step: int, stages: Mapping[str, Stage], splits: EntrySplits, phase: str | None
    ) -> Located:
        """Return the first place where copies differ. Some are known to.

        Note:
            Collective: call it on every rank.

        Args:
            channel: The control channel between all ranks.
            step: The step that this rank compared.
            stages: The digests of the stages that this rank compared.
            splits: The axes over which each of their entries is split.
            phase: "evaluation" if this rank compared an evaluation, otherwise None.
        """
        own = {
            stage: {self.copies(split).label: part for split, part in _by_split(each, splits[stage]).items()}
            for stage, each in stages.items()
        }
        digests = {stage: {label: part.digest for label, part in parts.items()} for stage, parts in own.items()}
        steps, phases, rows = zip(*channel.gather((step, phase, digests)), strict=True)
        if len(set(zip(steps, phases, strict=True))) > 1:
            return Located(first_difference(steps, [{}] * channel.size, phases), {}, [])
        stage, labels = self._differing(rows)
        sent = {
            label: (part, [stages[stage].names.index(name) for name in part.names])
            for label, part in own.get(stage, {}).items()
            if label in labels
        }
        parts = channel.gather(sent)
        found = []
        for label in labels:
            members = self.members(label)
            held: list[tuple[Stage, list[int]]] = [parts[rank].get(label, (Stage((), b""), [])) for rank in members]
            place = first_difference([step] * len(members), [{stage: part} for part, _ in held])
            position = min(
                (order[part.names.index(place.tensor)] for part, order in held if place.tensor in part.names),
                default=0,
            )
            found.append((position, label, _with_ids(place, members)))
        _, label, place = min(found, key=lambda row: row[:2])
        place = replace(place, phase=phases[0], stage_groups=self._groups(rows, label))
        others = [self._spell(other) for other in labels if other != label]
        return Located(place, self._spell(label), others)

    def members(self, label: Label) -> list[int]:
        """Return the ranks that hold copies of the tensors with this label."""
        return [
            rank
            for rank in sorted(self.axes.ranks)
            if all(self.axes.coordinate_of(rank)[axis] == position for axis, position in label)
        ]

    def _differing(self, rows: Sequence[Mapping[str, Mapping[Label, bytes]]]) -> tuple[str, list[Label]]:
        """Return the first stage of which copies differ, and the labels of those that do."""
        for stage in STAGES:
            labels = sorted({label for row in rows for label in row.get(stage, {})})
            differing = [
                label
                for label in labels
                if len({rows[rank].get(stage, {}).get(label, b"") for rank in self.members(label)}) > 1
            ]
            if differing:
                return stage, differing
        raise AssertionError("the sum over all ranks is not 0, so some copies differ")

    def _groups(self, rows: Sequence[Mapping[str, Mapping[Label, bytes]]], label: Label) -> dict[str, list[list[int]]]:
        """Return the groups of the ranks with a label in every stage that has entries with it."""
        members = self.members(label)
        groups = {}
        for stage in STAGES:
            digests = [rows[rank].get(stage, {}).get(label, b"") for rank in members]
            if any(digests):
                by_digest: dict[bytes, list[int]] = {}
                for rank, digest in zip(members, digests, strict=True):
                    by_digest.setdefault(digest, []).append(rank)
                groups[stage] = sorted(by_digest.values(), key=lambda ids: (-len(ids), ids))
        return groups

    def _spell(self, label: Label) -> dict[str, int]:
        return {self.axes.names[axis]: position for axis, position in label}


def _by_split(whole: Stage, splits: Sequence[Split]) -> dict[Split, Stage]:
    """Return the entries of a stage by the axes over which they are split."""
    kinds = dict.fromkeys(splits)
    if len(kinds) == 1:
        return {next(iter(kinds)): whole}
    places = {kind: [i for i, split in enumerate(splits) if split == kind] for kind in kinds}
    return {
        kind: Stage(
            tuple(whole.names[i] for i in rows),
            b"".join(whole.digests[_DIGEST * i : _DIGEST * (i + 1)] for i in rows),
        )
        for kind, rows in places.items()
    }


def _with_ids(place: Place, members: Sequence[int]) -> Place:
    """Return a place among some ranks, numbered from 0, with the numbers of these ranks."""
    moved = place.first_moved
    if moved is not None:
        position, names = moved
        by_rank = dict(zip(members, names, strict=True))
        moved = position, [by_rank.get(rank, "") for rank in range(max(members) + 1)]
    return replace(
        place,
        groups=[[members[i] for i in ids] for ids in place.groups],
        only_on={name: [members[i] for i in ids] for name, ids in place.only_on.items()},
        first_moved=moved,
    )


def open_shards(subject: Subject, mesh: Any, partitioned: Collection[str], channel: Channel) -> Shards | None:
    """Return the parts that this rank holds, or None for a model without a mesh.

    Args:
        subject: The model.
        mesh: The DeviceMesh of all ranks, or None for that of the model's DTensors.
        partitioned: The axes along which ranks hold different tensors.
        channel: The control channel between all ranks.

    Raises:
        UsageError: If the mesh is not one of all ranks, or has no axis of a name.
    """
    sharded: Any = next((tensor for tensor in subject.tensors() if is_sharded(tensor)), None)
    if mesh is None and sharded is None:
        if partitioned:
            text = f"partitioned={tuple(partitioned)!r} names axes of a mesh. Pass it, too: mesh=device_mesh."
            raise invalid_argument("partitioned", partitioned, text)
        return None
    numbers = {rank: number for number, rank in enumerate(channel.ranks_of_job)}
    try:
        axes = axes_of(root_of(sharded.device_mesh) if mesh is None else mesh, channel.rank, numbers)
    except LookupError as error:
        text = f"mesh: {error}. Pass the DeviceMesh of all these ranks, of which the model's meshes are parts."
        raise invalid_argument("mesh", str(mesh), text) from error
    for name in partitioned:
        if name not in axes.names:
            text = f"partitioned: {name!r} is no axis of the mesh. {nearest(name, axes.names)}"
            raise invalid_argument("partitioned", partitioned, text)
    return Shards(Splits(axes, numbers, partitioned), lambda: named_weights(subject.model))
