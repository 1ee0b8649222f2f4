"""The text of a fault, as warnings show it."""

from typing import Any

import pytest

from dreplica.config.schema import FaultConfig


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "1 bit of a tensor in weights on replica 1 at step 3"),
        ({"bits": 3, "tensor": "fc"}, "3 bits of fc in weights on replica 1 at step 3"),
        ({"element": 17, "bits": 2}, "2 bits of element 17 of a tensor in weights on replica 1 at step 3"),
        ({"bit": 30, "tensor": "fc"}, "bit 30 of an element of fc in weights on replica 1 at step 3"),
        ({"bit": 30, "element": 17, "tensor": "fc"}, "bit 30 of element 17 of fc in weights on replica 1 at step 3"),
        ({"scale": 1.1, "repeat": True}, "an element of a tensor times 1.1 in weights on replica 1 from step 3 on"),
        ({"scale": 1.1, "element": 0}, "element 0 of a tensor times 1.1 in weights on replica 1 at step 3"),
    ],
)
def test_fault_is_described(keys: dict[str, Any], text: str) -> None:
    assert str(FaultConfig(replica=1, step=3, target="weights", **keys)) == text
