"""Values of single numbers and forms of tensors, as evidence of what differs: a learning rate, a loss, a dtype."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice

from torch import Tensor

from dreplica.agreement.hasher import Hasher
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.state.fingerprint.stage import Stage
from dreplica.state.stages import Entry, with_distinct_names

_LONGEST_VALUE = 60
"""Longest text of a value, in characters."""
STAGES_OF_STATE = ("buffers", "gradients", "optimizer", "weights")
"""Stages of tensors that a replica keeps, whose form no batch decides."""
_MOST_VALUES = 12
"""Entries whose values are read. All values are hashed again, which for a few is cheap."""


def read_values(hasher: Hasher, stage: Stage, entries: Iterable[Entry], names: Collection[str]) -> dict[str, str]:
    """Return the values of entries that are single numbers or short texts and have not changed since they were hashed.

    Args:
        hasher: The hasher that computed the digests.
        stage: The digests of the entries at the time of the comparison.
        entries: The entries now.
        names: The names of the entries to read.

    Returns:
        Name to value, as text, for the first 12 of them. Entries that have other values now than those hashed are left
        out.
    """
    wanted = set(names)
    found = ((name, value) for name, value in with_distinct_names(entries) if name in wanted and _is_small(value))
    small = dict(islice(found, _MOST_VALUES))
    return {name: _text(small[name]) for name in read_unchanged(hasher, stage, small.items(), small)}


def read_unchanged(hasher: Hasher, stage: Stage, entries: Iterable[Entry], names: Collection[str]) -> list[str]:
    """Return the names of entries that have not changed since they were hashed.

    Args:
        hasher: The hasher that computed the digests.
        stage: The digests of the entries at the time of the comparison.
        entries: The entries now.
        names: The names of the entries to compare.
    """
    wanted = [(name, value) for name, value in with_distinct_names(entries) if name in names]
    now, hashed = hasher.start({"": wanted}).stages[""].entries(), stage.entries()
    return [name for name, _ in wanted if now[name] == hashed.get(name)]


def read_forms(entries: Iterable[Entry], names: Collection[str]) -> dict[str, str]:
    """Return element type and shape of the first 12 tensors with one of the given names."""
    wanted = set(names)
    found = (
        (name, value) for name, value in with_distinct_names(entries) if name in wanted and isinstance(value, Tensor)
    )
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        for name, value in islice(found, _MOST_VALUES)
    }


def describe_forms(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[Evidence]:
    """Return a line with the element types and shapes of differing entries, if these differ.

    Args:
        names: The differing entries, in causal order.
        rows: For each replica, entry to form, for the tensors that could be read.
    """
    columns = {name: [row.get(name) for row in rows] for name in names}
    forms = {name: column for name, column in columns.items() if len(set(column) - {None}) > 1}
    some = "; ".join(f"{name} is {spell_values(column)}" for name, column in forms.items())
    return [Evidence.of("tensor-forms-differ", some=some, forms=forms)] if forms else []


def describe_values(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[Evidence]:
    """Return a line with the values of differing entries.

    Args:
        names: The differing entries, in causal order.
        rows: For each replica, entry to value, for the values that could be read.
    """
    texts: dict[tuple[str, str], list[str]] = {}
    values = {}
    for name in names:
        column = [row.get(name) for row in rows]
        if len(set(column) - {None}) > 1:
            values[name] = column
            key, text = name.rpartition(".")[2], spell_values(column)
            texts.setdefault((name if key.isdigit() else key, text), []).append(name)
    lines = [f"{same[0] if len(same) == 1 else f'*.{key} ({len(same)})'} {text}" for (key, text), same in texts.items()]
    return [Evidence.of("values-differ", some="; ".join(lines), values=values)] if lines else []


def spell_values(column: Sequence[str | None]) -> str:
    """Return a value per replica in words: `0.1 on replicas 0, 2, 0.5 on replica 1`. None values are left out."""
    groups: dict[str, list[int]] = {}
    for replica, value in enumerate(column):
        if value is not None:
            groups.setdefault(value, []).append(replica)
    return ", ".join(f"{value} on replica{'s' if len(ids) > 1 else ''} {_spell(ids)}" for value, ids in groups.items())


def drawn_on_some(generators: Sequence[str], not_drawn: Sequence[Collection[str]]) -> list[Evidence]:
    """Return a line for each differing generator that only some replicas have drawn from.

    Args:
        generators: The generators that differ.
        not_drawn: For each replica, the generators that nothing has drawn from.
    """
    lines = []
    for name in generators:
        without = [replica for replica, names in enumerate(not_drawn) if name in names]
        drawn = [replica for replica in range(len(not_drawn)) if replica not in without]
        if without and drawn:
            lines.append(Evidence.of("generator-drawn-on-some", generator=name, drawn=drawn, not_drawn=without))
    return lines


def _is_small(value: Tensor | bytes | None) -> bool:
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() == 1 and not value.is_meta
    return value is None or (len(value) <= _LONGEST_VALUE and value.isascii() and value.decode().isprintable())


def _text(value: Tensor | bytes | None) -> str:
    if isinstance(value, Tensor):
        return repr(value.item())
    return "missing" if value is None else value.decode()


def _spell(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
