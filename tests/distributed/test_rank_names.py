"""Names of ranks in messages."""

import pytest

from dreplica.distributed.rank_names import name_ranks


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([3], "rank 3"),
        ([7, 3], "ranks 3, 7"),
        ([3, 4], "ranks 3, 4"),
        ([1, 2, 3], "ranks 1-3"),
        ([0, *range(3, 17), 18, 18], "ranks 0, 3-16, 18"),
        (range(0, 100, 2), f"ranks {', '.join(map(str, range(0, 40, 2)))}, …"),
    ],
)
def test_name_ranks_joins_ranges(ranks: list[int], expected: str) -> None:
    assert name_ranks(ranks) == expected


def test_name_ranks_counts_other_units() -> None:
    assert name_ranks([1, 2], "node") == "nodes 1, 2"
