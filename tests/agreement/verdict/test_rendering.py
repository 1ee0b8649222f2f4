"""Rendering of texts from data."""

from typing import Any

import pytest

from dreplica.agreement.verdict.rendering import plain, render


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"x": ["a", "b"]}, "x: a, b"),
        ({"x": ("a",)}, "x: a"),
        ({"x": [0, 2]}, "x: [0, 2]"),
        ({"x": []}, "x: []"),
        ({"x": None}, "x: None"),
        ({"x": "{y}"}, "x: {y}"),
    ],
)
def test_render(data: dict[str, Any], text: str) -> None:
    assert render("x: {x}", data) == text


def test_plain_returns_json_values() -> None:
    value = {"a": (1, 2.5), "b": {0: float("nan")}, "c": ValueError("no"), "d": None, "e": True}
    assert plain(value) == {"a": [1, 2.5], "b": {"0": "nan"}, "c": "no", "d": None, "e": True}
