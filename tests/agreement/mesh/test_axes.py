"""The place of a rank in a mesh, and the ranks that hold copies."""

import pytest

from dreplica.agreement.mesh.axes import Axes

PLACES = [Axes(("replicate", "shard", "tp"), (2, 3, 2), tuple(range(12)), rank) for rank in range(12)]


def test_coordinates_count_the_last_axis_fastest() -> None:
    assert [place.coordinate for place in PLACES][:3] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert len({place.coordinate for place in PLACES}) == 12
    assert PLACES[0].coordinate_of(11) == (1, 2, 1)


def test_copies_share_the_coordinates_of_the_split() -> None:
    copies = PLACES[7].copies(frozenset({1}))  # at (1, 0, 1)
    assert copies.label == ((1, 0),)
    assert copies.ranks == (0, 1, 6, 7)
    assert copies.index == 3
    assert PLACES[7].copies(frozenset()).ranks == tuple(range(12))
    assert PLACES[7].copies(frozenset({0, 1, 2})).ranks == (7,)


def test_ranks_of_copies_are_in_the_same_order_on_all() -> None:
    for place in PLACES:
        copies = place.copies(frozenset({0}))
        assert copies.ranks[copies.index] == place.rank
        for rank in copies.ranks:
            assert PLACES[rank].copies(frozenset({0})).ranks == copies.ranks


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [([7], set()), ([1, 7], {0}), ([7, 9, 11], {1}), ([6, 7], {2}), (range(6, 12), {1, 2}), (range(12), {0, 1, 2})],
)
def test_find_names_axes_single_or_flattened(ranks: list[int], axes: set[int]) -> None:
    assert PLACES[7].find(ranks) == axes


def test_find_refuses_ranks_along_no_axis() -> None:
    with pytest.raises(LookupError, match="replicate 2 x shard 3 x tp 2"):
        PLACES[7].find([7, 8])


def test_find_ignores_axes_of_one_rank() -> None:
    assert Axes(("a", "b"), (1, 2), (0, 1), 0).find([0, 1]) == {1}
    assert Axes(("a", "b"), (1, 2), (0, 1), 0).find([0]) == set()
