"""The schema: which keys replicas share, and that a config written out reads back."""

from pathlib import Path

import yaml

from dreplica.config.base import Lockstep
from dreplica.config.schema import RunConfig
from tests.config.loading import load

_DETERMINISM = {
    "mode": "warn",
    "threads": 2,
    "cudnn_benchmark": True,
    "cudnn_deterministic": False,
    "tf32": True,
    "reduced_precision_reduction": True,
    "onednn": False,
    "fill_uninitialized_memory": False,
    "cublas_workspace_config": ":16:8",
}


OVERRIDABLE = {
    "world.device": "cpu",
    "model.name": "resnet34",
    "model.factory": "m:f",
    "model.weights": "w.pth",
    "model.num_classes": 12,
    "model.channels_last": True,
    "model.compile": "eager",
    "replica.factory": "m:f",
    "criterion.name": "NLLLoss",
    "optim.name": "Adam",
    "optim.lr": 0.25,
    "schedule.name": "ConstantLR",
    "schedule.per": "step",
    "data.root": "elsewhere",
    "data.num_workers": 2,
    "data.decode": "node",
    "data.cache": "memory",
    "train.amp": "bf16",
    "train.grad_clip": 1.0,
    "train.accumulate": 2,
    **{f"determinism.{key}": value for key, value in _DETERMINISM.items()},
}
"""Keys in which replicas may differ. The run reads them from `Prepared.own`."""

NEEDED = {"schedule.per": {"schedule": {"name": "StepLR", "step_size": 1}}, "data.root": {"data": {"name": "CIFAR10"}}}
"""Settings without which a key has no effect."""


def test_each_key_is_shared_or_can_be_overridden(tmp_path: Path) -> None:
    keys = {
        f"{section}.{key}": any(isinstance(mark, Lockstep) for mark in item.metadata)
        for section, field in RunConfig.model_fields.items()
        for key, item in getattr(field.annotation, "model_fields", {}).items()
    }
    assert {key for key, shared in keys.items() if not shared} == set(OVERRIDABLE)
    for key, value in OVERRIDABLE.items():
        section, _, name = key.partition(".")
        text = yaml.safe_dump({"overrides": {1: {section: {name: value}}}, **NEEDED.get(key, {})})
        config = load(tmp_path, text)
        own = config.for_replica(1)
        assert getattr(getattr(own, section), name) == value != getattr(getattr(config, section), name)


def test_to_yaml_round_trips(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-3, momentum: 0.9}\nseed: {model: [1, 2]}\noverrides: {1: {determinism: {mode: off}}}"
    config = load(tmp_path, text)
    assert load(tmp_path, config.to_yaml()) == config
