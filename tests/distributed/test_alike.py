"""Exchange of mappings as differences from rank 0's."""

import json
from typing import Any

import pytest

from dreplica.distributed.alike import gather_alike, pack, unpack
from dreplica.distributed.channel import Channel


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": None},
        {"a": 2, "b": {"c": 2, "d": [1]}, "e": None},
        {"a": None, "b": {"c": {"x": 1}}, "f": {"g": 1}},
        {"a": {"x": 1}, "b": None, "e": {"y": {}}},
    ],
)
def test_packed_mapping_is_restored(other: dict[str, Any]) -> None:
    first = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": None}
    packed = json.loads(json.dumps(pack(first, other)))
    assert unpack(first, packed) == other


class _TwoRanks(Channel):
    """A channel that plays the part of rank 1, and keeps what it sends."""

    def __init__(self, first: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.size, self.first = 1, 2, first
        self.sent: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        self.sent.append(value)
        return [self.first if len(self.sent) == 1 else pack(self.first, self.first), value]


def test_gather_sends_only_what_differs() -> None:
    first = {"host": "a", "large": {str(i): i for i in range(1000)}}
    own = {"host": "b", "large": first["large"] | {"7": 0}}
    channel = _TwoRanks(first)
    assert gather_alike(own, channel) == [first, own]
    assert len(json.dumps(channel.sent)) < 200
