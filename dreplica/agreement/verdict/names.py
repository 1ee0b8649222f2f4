"""Short lists of many names of tensors."""

from collections.abc import Sequence

_MOST_LISTED = 4


def list_names(names: Sequence[str]) -> str:
    """Return up to four names, or the first one and the patterns of all: `conv1.weight, ... (*.weight 21, *.bias 20)`.

    A pattern is the last part of a dotted name. At most four patterns are listed, the others are counted.
    """
    if len(names) <= _MOST_LISTED:
        return ", ".join(names)
    counts: dict[str, int] = {}
    for name in names:
        pattern = f"*.{name.rpartition('.')[2]}" if "." in name else name
        counts[pattern] = counts.get(pattern, 0) + 1
    largest = sorted(counts.items(), key=lambda item: -item[1])
    listed = [f"{pattern} {count}" if count > 1 else pattern for pattern, count in largest[:_MOST_LISTED]]
    more = len(names) - sum(count for _, count in largest[:_MOST_LISTED])
    return f"{names[0]}, ... ({', '.join(listed)}{f', {more} more' if more else ''})"
