"""Names of ranks in messages, short however many there are."""

from collections.abc import Iterable

_MAX_PIECES = 20


def name_ranks(ranks: Iterable[int], unit: str = "rank") -> str:
    """Return the ranks as text, such as `rank 3` or `ranks 0, 3-16, 18`.

    Args:
        ranks: At least one rank, in any order.
        unit: What is counted, such as `rank` or `node`.
    """
    pieces: list[str] = []
    ordered = sorted(set(ranks))
    first = 0
    for index, rank in enumerate(ordered):
        if index + 1 < len(ordered) and ordered[index + 1] == rank + 1:
            continue
        run = ordered[first : index + 1]
        pieces += map(str, run) if len(run) < 3 else [f"{run[0]}-{run[-1]}"]
        first = index + 1
    shown = ", ".join(pieces[:_MAX_PIECES]) + (", …" if len(pieces) > _MAX_PIECES else "")
    return f"{unit}{'s' if len(ordered) > 1 else ''} {shown}"
