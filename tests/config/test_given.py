"""The keys that a user has chosen."""

import pytest

from dreplica.config.given import dotted_keys, given_keys, keep_given
from dreplica.config.schema import RunConfig


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({}, set()),
        (
            {"train": {"epochs": 2}, "optim": {"lr": 0.5, "momentum": 0.5}},
            {"train.epochs", "optim.lr", "optim.momentum"},
        ),
        ({"train": {}, "optim": None}, {"optim"}),
        ({"inject": [{"replica": 1}], "overrides": {1: {"optim": {"lr": 0.5}}}}, {"inject", "overrides"}),
    ],
)
def test_dotted_keys_are_those_of_sections(values: dict[str, object], keys: set[str]) -> None:
    assert dotted_keys(values) == keys


def test_keep_given_forgets_other_keys_and_keeps_values() -> None:
    config = RunConfig.model_validate({"train": {"epochs": 2}, "optim": {"lr": 0.5, "momentum": 0.5}})
    assert given_keys(config) == {"train.epochs", "optim.lr", "optim.momentum"}
    keep_given(config, {"optim.momentum", "optim.dampening"})
    assert given_keys(config) == {"optim.momentum"}
    assert (config.train.epochs, config.optim.arguments) == (2, {"lr": 0.5, "momentum": 0.5})
    assert config == RunConfig.model_validate(config.model_dump())
