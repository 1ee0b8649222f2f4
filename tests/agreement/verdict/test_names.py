"""Short lists of names."""

import pytest

from dreplica.agreement.verdict.names import list_names


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a.b", "c", "d", "e"], "a.b, c, d, e"),
        ([f"{n}.weight" for n in range(5)], "0.weight, ... (*.weight 5)"),
        (["lr", *(f"{n}.{s}" for n in range(3) for s in "xy")], "lr, ... (*.x 3, *.y 3, lr)"),
        ([f"a.{n}" for n in range(9)], "a.0, ... (*.0, *.1, *.2, *.3, 5 more)"),
    ],
)
def test_list_names_shortens(names: list[str], text: str) -> None:
    assert list_names(names) == text
