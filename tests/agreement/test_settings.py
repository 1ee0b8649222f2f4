"""Arguments of `Agreement` that must be the same on every rank."""

from typing import Any

import pytest

from dreplica.distributed.process_group import World
from tests.agreement.own_loop import train
from tests.harness import run_replicas

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "every": (1, 0),
    "lag": (0, 1),
    "stages": (["weights"], ["batch", "weights"]),
    "on_divergence": ("stop", "continue"),
    "expect": ("identical", "ddp"),
    "record": ("runs/a", None),
    "reference": (None, "runs/a"),
}


def _train_all(world: World) -> list[Any]:
    errors = []
    for name, values in DIFFERENT.items():
        try:
            train(rank=world.replica_id, **{name: values[world.replica_id == 1]})
        except ValueError as error:
            errors.append(error)
    return errors


@pytest.fixture(scope="module")
def errors() -> list[list[Any]]:
    """Return the error of each case, on each of three ranks."""
    return run_replicas(_train_all, 3)


def test_different_settings_are_refused_on_all_ranks(errors: list[list[Any]]) -> None:
    for row in errors:
        assert [error.code for error in row] == ["settings-differ"] * len(DIFFERENT)
    texts = [[str(error) for error in row] for row in errors]
    assert texts[0] == texts[1] == texts[2]
    for name, text in zip(DIFFERENT, texts[0], strict=True):
        argument = "stages" if name == "expect" else name
        assert text.startswith((f"{argument} must be the same on every rank", "expect must be")), text
        assert "rank 0" in text
        assert "rank 1" in text
