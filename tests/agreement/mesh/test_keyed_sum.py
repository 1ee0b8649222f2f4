"""The message of a step for all ranks of a simulated mesh: 40 bytes that find any difference between copies."""

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreplica.agreement.mesh.axes import Axes, Split
from dreplica.agreement.mesh.keyed_sum import message, outcome
from dreplica.agreement.protocol import Outcome

MESH = ("replicate", "shard", "tp"), (3, 2, 2)
SPLITS: tuple[Split, ...] = tuple(
    frozenset(split) for count in range(4) for split in itertools.combinations(range(3), count)
)


def mesh(sizes: Sequence[int] = MESH[1]) -> list[Axes]:
    """Return the place of every rank, whose numbers are not in the mesh's order."""
    count = torch.Size(sizes).numel()
    ranks = tuple(random.Random(0).sample(range(count), count))
    names = tuple(f"axis{number}" for number in range(len(sizes)))
    return [Axes(names, tuple(sizes), ranks, rank) for rank in range(count)]


def reduced(places: Sequence[Axes], digests: Sequence[Mapping[Split, bytes]]) -> Outcome:
    messages = [
        message([(place.copies(split), digest) for split, digest in row.items()], stop=False)
        for place, row in zip(places, digests, strict=True)
    ]
    assert {each.nbytes for each in messages} == {40}
    return outcome(torch.stack(messages).sum(0))


def equal_copies(places: Sequence[Axes]) -> list[dict[Split, bytes]]:
    """Return digests that differ wherever a tensor is split, and only there."""
    return [{split: repr(place.copies(split).label).encode().ljust(16)[:16] for split in SPLITS} for place in places]


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 2), (3, 2, 2), (2, 1, 3), (1, 1)], ids=str)
def test_copies_that_agree_agree_on_every_mesh(sizes: tuple[int, ...]) -> None:
    places = mesh(sizes)
    digests = [{frozenset(): b"all" * 5, frozenset({0}): bytes([place.coordinate[0]]) * 16} for place in places]
    assert reduced(places, digests).agreed


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rank", range(12))
def test_one_bit_on_one_rank_is_found_if_there_is_a_copy(split: Split, rank: int) -> None:
    places = mesh()
    digests = equal_copies(places)
    assert reduced(places, digests).agreed
    digest = digests[rank][split]
    digests[rank][split] = bytes([digest[0] ^ 1]) + digest[1:]
    assert reduced(places, digests).agreed == (len(places[rank].copies(split).ranks) == 1)


@given(st.lists(st.sampled_from([b"a" * 16, b"b" * 16, b"c" * 16]), min_size=2, max_size=9))
def test_a_ring_agrees_exactly_if_all_digests_are_equal(digests: list[bytes]) -> None:
    places = mesh((len(digests),))
    rows: list[dict[Split, bytes]] = [{frozenset(): digest} for digest in digests]
    assert reduced(places, rows).agreed == (len(set(digests)) == 1)


def test_planted_collisions_of_simpler_sums_are_found() -> None:
    """Digests that cancel in a plain sum, in an XOR, or in alternating signs, and those exchanged between groups."""
    one, two = b"\1" * 16, b"\2" * 16
    places = mesh((4,))
    for row in ((one, two, two, one), (one, two, one, two), (one, one, two, two), (two, one, one, two)):
        assert not reduced(places, [{frozenset(): digest} for digest in row]).agreed, row
    places = mesh((2, 2))
    exchanged = [{frozenset({1}): (one, two)[(place.coordinate[1] + place.coordinate[0]) % 2]} for place in places]
    assert not reduced(places, exchanged).agreed
    swapped = [
        {frozenset({0}): (one, two)[place.coordinate[1]], frozenset({1}): (one, two)[place.coordinate[0]]}
        for place in places
    ]
    assert not reduced(places, swapped).agreed


def test_random_differences_are_never_missed() -> None:
    draw, places = random.Random(1), mesh((2, 2))
    for _ in range(2000):
        digests: list[dict[Split, bytes]] = [{frozenset(): b"x" * 16, frozenset({0}): b"y" * 16} for _ in places]
        for _ in range(draw.randint(1, 3)):
            digests[draw.randrange(4)][draw.choice([frozenset(), frozenset({0})])] = draw.randbytes(16)
        assert not reduced(places, digests).agreed


def test_flags_of_any_rank_are_seen_beside_one_another() -> None:
    for stop, differs in itertools.product(itertools.product((False, True), repeat=2), repeat=2):
        messages = [message([], *flags) for flags in zip(stop, differs, strict=True)]
        result = outcome(torch.stack(messages).sum(0))
        assert (result.stop, result.differs_from_reference) == (any(stop), any(differs))
