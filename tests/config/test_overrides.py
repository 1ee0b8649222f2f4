"""Merging of partial configs, and what replicas may override."""

import pytest

from dreplica.config.overrides import check_override, merge
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError


def test_merge_is_recursive() -> None:
    base = {"train": {"epochs": 1, "amp": None}, "inject": [1]}
    assert merge(base, {"train": {"amp": "bf16"}, "inject": []}) == {
        "train": {"epochs": 1, "amp": "bf16"},
        "inject": [],
    }
    assert base == {"train": {"epochs": 1, "amp": None}, "inject": [1]}


def test_merge_drops_arguments_of_renamed_component() -> None:
    base = {"optim": {"name": "SGD", "lr": 0.5, "momentum": 0.9}}
    assert merge(base, {"optim": {"name": "Adam"}}) == {"optim": {"name": "Adam", "lr": 0.5}}
    assert merge(base, {"optim": {"name": "SGD"}}) == base


def test_check_override_accepts_own_keys() -> None:
    check_override("overrides.1", RunConfig(), RunConfig.model_validate({"train": {"accumulate": 2}}))


def test_check_override_refuses_shared_key() -> None:
    with pytest.raises(UsageError) as caught:
        check_override("overrides.1", RunConfig(), RunConfig.model_validate({"train": {"epochs": 2}}))
    assert (caught.value.code, caught.value.fields["key"]) == ("shared-key", "overrides.1.train.epochs")
