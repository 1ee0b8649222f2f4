"""Settings that a replica.factory replaces, and does not read."""

from typing import Any

import pytest
import torch
from torch import nn

from dreplica.config.components import build_criterion, build_optimizer, build_scheduler
from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError
from dreplica.replica.build import build_model, build_replica
from dreplica.state.replica import Replica
from tests.fixtures import tiny_model

CPU = torch.device("cpu")


def reads_nothing(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


def reads_lr(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=config.optim.lr))


def reads_all(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = build_model(config.model, num_classes)
    optimizer = build_optimizer(config.optim, model)
    return Replica(model, build_criterion(config.criterion), optimizer, build_scheduler(config.schedule, optimizer))


def keeps_config(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = reads_nothing(config, num_classes, device)
    replica.model.config = config  # type: ignore[assignment]
    return replica


def build(function: str, **sections: dict[str, Any]) -> Replica:
    config = RunConfig.model_validate({"replica": {"factory": f"{__name__}:{function}"}, **sections})
    return build_replica(config, 5, CPU)


@pytest.mark.parametrize(
    ("sections", "unread"),
    [
        ({"optim": {"lr": 0.5}}, ["optim.lr"]),
        ({"optim": {"name": "AdamW"}}, ["optim.name"]),
        ({"optim": {"lr": 0.5, "momentum": 0.5}}, ["optim.lr", "optim.momentum"]),
        ({"criterion": {"label_smoothing": 0.1}}, ["criterion.label_smoothing"]),
        ({"criterion": {"name": "CrossEntropyLoss"}}, ["criterion.name"]),
        (
            {"schedule": {"name": "StepLR", "step_size": 3, "per": "step"}},
            ["schedule.name", "schedule.per", "schedule.step_size"],
        ),
        ({"model": {"name": "resnet34"}}, ["model.name"]),
        ({"model": {"factory": "tests.fixtures:tiny_model"}}, ["model.factory"]),
        ({"model": {"weights": "DEFAULT"}}, ["model.weights"]),
        ({"model": {"compile": "eager"}}, ["model.compile"]),
    ],
)
def test_setting_that_the_function_does_not_read_is_an_error(sections: dict[str, Any], unread: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build("reads_nothing", **sections)
    fields = caught.value.fields
    assert caught.value.code == "ignored-setting"
    assert [fields["key"], *fields["others"]] == unread
    assert f"replica.factory is '{__name__}:reads_nothing'" in fields["reason"]
    assert "Remove " in fields["fix"]


def test_settings_that_the_function_reads_are_accepted() -> None:
    sections = {
        "model": {"factory": "tests.fixtures:tiny_model"},
        "optim": {"name": "SGD", "lr": 0.5, "momentum": 0.5},
        "criterion": {"name": "CrossEntropyLoss"},
    }
    assert build("reads_all", **sections).optimizer.param_groups[0]["momentum"] == 0.5
    build("keeps_config", **sections)
    build("reads_lr", optim={"lr": 0.5})
    with pytest.raises(UsageError, match=r"^optim.momentum: this setting has no effect because replica.factory is"):
        build("reads_lr", optim={"lr": 0.5, "momentum": 0.5})


def test_settings_of_the_trainer_are_accepted() -> None:
    build("reads_nothing", model={"num_classes": 6, "init": "broadcast", "channels_last": True}, train={"epochs": 2})


def test_defaults_of_the_packaged_config_are_accepted() -> None:
    config = load_config([f"--replica.factory={__name__}:reads_nothing"], 2)
    assert config.schedule.name is not None
    build_replica(config, 5, CPU)
    build_replica(config.for_replica(1), 5, CPU)


def test_override_of_a_replica_counts() -> None:
    config = load_config([f"--replica.factory={__name__}:reads_nothing", "--overrides.1.optim.lr=0.5"], 2)
    build_replica(config.for_replica(0), 5, CPU)
    with pytest.raises(UsageError, match=r"^optim.lr: this setting has no effect"):
        build_replica(config.for_replica(1), 5, CPU)
