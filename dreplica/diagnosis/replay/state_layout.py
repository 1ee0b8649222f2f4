"""What the replicas' state consists of: compared before any of it is exchanged or replayed.

State of another structure cannot be shared, so a difference ends the diagnosis with a verdict. Only another order of
parameters, and other modes of modules, leave the names and shapes equal, so that the step can still be replayed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.distributed.alike import gather_alike
from dreplica.distributed.attempt import attempt
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint.fingerprint import digest_bytes
from dreplica.state.replica import Parts
from dreplica.state.stages import batch_entries, named_buffers, named_weights, parameter_names
from dreplica.state.walk import MODEL, OPTIMIZER, StateWalk

Layout = dict[str, dict[str, Any]]
"""Section to item to value, all of them JSON values."""

_MOST_NAMED = 5


@dataclass(frozen=True)
class Column:
    """An item of a layout whose value differs between replicas."""

    name: str
    """The item, such as `head.bias`."""
    values: tuple[Any, ...]
    """One value per replica; None on a replica that has no such item."""

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for replica_id, value in enumerate(self.values):
            groups.setdefault("missing" if value is None else str(value), []).append(replica_id)
        parts = (
            f"{value} on replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}" for value, ids in groups.items()
        )
        return f"{self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Structure:
    """A difference between the structures of replicas' states."""

    cause: str
    """The cause: `order-differs` if replicas have the same groups of parameters in another order."""
    evidence: Evidence
    """What differs."""
    stage: str
    """The stage that contains the item."""
    tensor: str | None
    """The first item that differs, as its stage names it."""
    values: tuple[Any, ...]
    """Its value on each replica."""


@dataclass(frozen=True)
class LayoutDifferences:
    """The differences between the replicas' layouts, by section."""

    columns: Mapping[str, Sequence[Column]] = field(default_factory=dict)
    """The items that differ, by section. Empty if the layouts are equal."""
    same_groups: bool = True
    """True if all optimizers have the same groups of parameters, in any order."""

    @property
    def batch(self) -> Evidence | None:
        """The tensors of the batch that have other shapes or dtypes."""
        rows = self.columns.get("batch", ())
        return _tensors(rows, "of the batch") if rows else None

    @property
    def order(self) -> Evidence | None:
        """The first position at which replicas have another parameter or buffer."""
        rows = self.columns.get("order", ())
        if not rows:
            return None
        where, _, position = rows[0].name.rpartition(" ")
        return Evidence.of(
            "order-differs",
            where=where,
            stage={"parameters": "weights", "buffers": "buffers"}.get(where.rpartition(" ")[2], "optimizer"),
            position=int(position),
            places=_spell([Column(f"position {position}", rows[0].values)]),
            names=list(rows[0].values),
            count=len(rows),
        )

    @property
    def modes(self) -> Evidence | None:
        """The modules that are in training mode on some replicas only."""
        rows = self.columns.get("modes", ())
        if not rows:
            return None
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            alike.setdefault(tuple(map(str, row.values)), []).append(row.name)
        columns = [Column(_some(names), values) for values, names in alike.items()]
        return Evidence.of("modes-differ", places=_spell(columns), modules=[row.name for row in rows])

    def structure(self) -> Structure | None:
        """Return the first difference in structure, or None if every state can be copied to all replicas."""
        for section in ("objects", "tensors", "groups", "state"):
            rows = self.columns.get(section)
            if rows:
                order = section == "groups" and self.same_groups
                return _structure(section, rows, "order-differs" if order else "structure-differs")
        return None


def gather_layouts(parts: Parts, batch: Any, channel: Channel) -> LayoutDifferences:
    """Compare the layouts of all replicas.

    Args:
        parts: The state of this replica.
        batch: The batch of this replica.
        channel: The control channel between all replicas.

    Note:
        Collective: call on every rank.

    Raises:
        AttemptFailed: Some replica's layout cannot be read. It is raised on all replicas.
    """
    own = attempt(channel, lambda: layout_of(parts, batch))
    digests = channel.gather(digest_bytes("layout", repr(own).encode()))
    if len(set(digests)) == 1:
        return LayoutDifferences()
    rows = gather_alike(own, channel)
    columns = {section: list(_columns([row[section] for row in rows])) for section in own}
    groups = [_groups_of(row) for row in rows]
    return LayoutDifferences(columns, same_groups=all(each == groups[0] for each in groups))


def layout_of(parts: Parts, batch: Any) -> Layout:
    """Return the layout of one replica's state.

    Args:
        parts: The state of this replica.
        batch: The batch of this replica.

    Returns:
        By section: `objects`, the types of optimizers and of other objects; `tensors`, dtype and shape of parameters
        and buffers; `groups`, the parameter group of each parameter; `state`, dtype and shape of the optimizers'
        tensors; `order`, the name at each position; `modes`, the mode of each module; `batch`, dtype and shape of its
        tensors.
    """
    walk = StateWalk(parts)
    tensors = {name: _shape(tensor) for name, tensor in walk.tensors().items()}
    of_optimizers = {name: text for name, text in tensors.items() if name.startswith(f"{OPTIMIZER}.")}
    objects = {f"optimizer {name!r}" if name else OPTIMIZER: optimizer for name, optimizer in parts.optimizers.items()}
    others = {f"others[{index}]": other for index, other in enumerate(walk.others)}
    groups: dict[str, str] = {}
    order: dict[str, str] = {}
    order |= _positions("the model's parameters", named_weights(parts.model))
    order |= _positions("the model's buffers", named_buffers(parts.model))
    for name, optimizer in parts.optimizers.items():
        names = parameter_names(parts.model, optimizer, name)
        for index, group in enumerate(optimizer.param_groups):
            held = [names[parameter] for parameter in group["params"]]
            where = f"group {index} of the optimizer {name}".rstrip()
            groups |= {f"{name} {each}".lstrip(): where for each in held}
            order |= _positions(where, held)
    return {
        "objects": {name: type(each).__name__ for name, each in (objects | others).items()},
        "tensors": {
            name.removeprefix(f"{MODEL}."): text for name, text in tensors.items() if name not in of_optimizers
        },
        "groups": groups,
        "state": of_optimizers,
        "order": order | _positions("the optimizers", parts.optimizers),
        "modes": {
            name or "the model": "training mode" if module.training else "evaluation mode"
            for name, module in parts.model.named_modules()
        },
        "batch": {
            name: _shape(value) if isinstance(value, Tensor) else "no tensor" for name, value in batch_entries(batch)
        },
    }


def _positions(where: str, names: Any) -> dict[str, str]:
    return {f"{where} {position}": name for position, name in enumerate(names)}


def _shape(tensor: Tensor) -> str:
    layout = "" if str(tensor.layout) == "torch.strided" else f" {str(tensor.layout).removeprefix('torch.')}"
    kind = "parameter " if isinstance(tensor, nn.Parameter) else ""
    return f"{kind}{str(tensor.dtype).removeprefix('torch.')}{layout} {tuple(tensor.shape)}"


def _columns(rows: Sequence[Mapping[str, Any]]) -> Iterator[Column]:
    for name in dict.fromkeys(name for row in rows for name in row):
        values = tuple(row.get(name) for row in rows)
        if any(value != values[0] for value in values):
            yield Column(name, values)


def _structure(section: str, rows: Sequence[Column], cause: str) -> Structure:
    first = rows[0]
    if section == "objects":
        return Structure(cause, Evidence.of("objects-differ", places=_spell(rows)), "optimizer", None, first.values)
    if section == "groups":
        line = Evidence.of("groups-differ", count=len(rows), places=_spell(rows), names=[row.name for row in rows])
        return Structure(cause, line, "optimizer", first.name, first.values)
    if section == "tensors":
        return Structure(cause, _tensors(rows, "of the model"), _stage_of(first), first.name, first.values)
    without = [r for r in range(len(first.values)) if all(row.values[r] is None for row in rows)]
    name = first.name.removeprefix(f"{OPTIMIZER}.")
    line = _tensors(rows, "of the optimizer's state")
    if without:
        line = Evidence.of("optimizer-state-missing", replicas=without, count=len(rows), tensor=name)
    return Structure(cause, line, "optimizer", name, first.values)


def _stage_of(column: Column) -> str:
    """Return the stage of a parameter or buffer."""
    return "weights" if any(str(value).startswith("parameter ") for value in column.values) else "buffers"


def _groups_of(row: Layout) -> set[frozenset[str]]:
    """Return the groups of parameters, regardless of their positions."""
    groups: dict[str, set[str]] = {}
    for name, group in row["groups"].items():
        groups.setdefault(group, set()).add(name)
    return {frozenset(names) for names in groups.values()}


def _tensors(rows: Sequence[Column], what: str) -> Evidence:
    return Evidence.of(
        "tensors-differ", what=what, count=len(rows), places=_spell(rows), tensors=[row.name for row in rows]
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _spell(rows: Sequence[Column]) -> str:
    more = f"; and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
    return "; ".join(map(str, rows[:_MOST_NAMED])) + more
