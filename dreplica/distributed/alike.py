"""Exchange of mappings that are nearly the same on all replicas, as differences from rank 0's."""

from collections.abc import Mapping
from typing import Any

from dreplica.distributed.channel import Channel


def gather_alike(own: Mapping[str, Any], channel: Channel) -> list[dict[str, Any]]:
    """Exchange nested mappings, of which each replica sends only what differs from that of rank 0.

    Args:
        own: The mapping of this replica. Its keys are strings.
        channel: The control channel between all replicas.

    Returns:
        The mapping of each replica, in the order of ranks.

    Note:
        Collective: call on every rank.
    """
    first = channel.gather(own if channel.rank == 0 else None)[0]
    return [unpack(first, changes) for changes in channel.gather(pack(first, own))]


def pack(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the difference of one mapping from another, from which `unpack` restores it."""
    changed = {key: value for key, value in other.items() if key not in first or first[key] != value}
    nested = {
        key: pack(first[key], changed.pop(key))
        for key, value in list(changed.items())
        if isinstance(value, Mapping) and isinstance(first.get(key), Mapping)
    }
    return {"changed": changed, "nested": nested, "missing": [key for key in first if key not in other]}


def unpack(first: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping whose difference from `first` is given."""
    missing = set(changes["missing"])
    row = {key: value for key, value in first.items() if key not in missing}
    row |= {key: unpack(first[key], inner) for key, inner in changes["nested"].items()}
    return row | changes["changed"]
