"""Settings that would be ignored with another one are errors, field by field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dreplica.config.ignored import CODE, RULES, ignored_setting
from dreplica.config.load import load_config
from dreplica.config.schema import FaultConfig, RunConfig
from dreplica.errors import UsageError
from tests.config.loading import load, refusal

ALWAYS = {
    "world.device": "",
    "world.timeout": "",
    "run.name": "",
    "run.root": "",
    "run.resume": "",
    "seed.model": "also with model.init broadcast: dropout draws from it",
    "seed.data": "",
    "model.factory": "unless replica.factory does not read it",
    "model.weights": "names of torchvision with model.factory are a separate error",
    "model.num_classes": "replica.factory gets it as an argument",
    "model.init": "also with replica.factory",
    "model.channels_last": "also with replica.factory: of the inputs",
    "model.compile": "unless replica.factory does not read it",
    "replica.factory": "",
    "criterion.name": "unless replica.factory does not read it",
    "optim.name": "unless replica.factory does not read it",
    "optim.lr": "unless replica.factory does not read it",
    "schedule.name": "unless replica.factory does not read it",
    "data.name": "",
    "data.batch_size": "",
    "data.num_workers": "",
    "data.val_fraction": "unless the data have a validation set, or a function does not read it",
    "data.split_seed": "unless the data have a validation set, or a function does not read it",
    "data.sample_weights": "a separate error where samples have no files",
    "data.augment": "a separate error where samples are no images",
    "data.image_size": "a separate error where samples are no images",
    "data.decode": "a separate error where samples are no images",
    "data.cache": "a separate error where samples are no images",
    "data.on_error": "",
    "train.epochs": "a limit with train.max_steps, of which the first ends the run",
    "train.max_steps": "a limit with train.epochs, of which the first ends the run",
    "train.amp": "",
    "train.grad_clip": "",
    "determinism.mode": "",
    "determinism.threads": "",
    "determinism.onednn": "",
    "checkpoint.every_steps": "",
    "checkpoint.every_epochs": "",
    "agreement.every": "",
    "agreement.expect": "",
    "agreement.record": "also with agreement.every 0: of the final state",
    "report.tensorboard": "",
    "report.wandb": "",
    "inject.replica": "",
    "inject.target": "",
    "inject.element": "",
    "inject.scale": "",
    "inject.repeat": "",
    "inject.seed": "",
}
"""Settings that have an effect with any other of the config, and notes on them."""

MODE_OFF = "determinism: {mode: off}"
ON_CPU = "world: {device: cpu}"
CHECKPOINTS_OFF = "checkpoint: {every_epochs: null}"
EVERY_0 = "agreement: {every: 0}"
FAULT = "inject: [{replica: 1, step: 3, target: %s}]"

IGNORED: dict[str, list[tuple[Any, str, str]]] = {
    "model.name": [
        ("resnet34", "model: {factory: 'm:f'}", "model.factory is 'm:f'"),
        ("resnet18", "model: {factory: 'm:f'}", "model.factory is 'm:f'"),
    ],
    "schedule.per": [
        ("step", "{}", "schedule.name is null"),
        ("epoch", "schedule: {name: null}", "schedule.name is null"),
    ],
    "data.root": [("folder", "data: {name: digits}", "data.name is 'digits'"), ("x", "{}", "data.name is 'digits'")],
    "seed.augment": [(0, "{}", "data.augment is null"), (3, "data: {augment: null}", "data.augment is null")],
    "run.stop_after": [(n, "train: {max_steps: 7}", "train.max_steps is 7, the last step") for n in (7, 8)],
    "train.accumulate": [(17, "data: {batch_size: 16}", "data.batch_size is 16")],
    "determinism.fill_uninitialized_memory": [(True, MODE_OFF, "determinism.mode is 'off'")],
    "determinism.cublas_workspace_config": [
        (":16:8", MODE_OFF, "determinism.mode is 'off'"),
        (":16:8", ON_CPU, "world.device is 'cpu'"),
    ],
    "determinism.cudnn_benchmark": [(True, ON_CPU, "world.device is 'cpu'")],
    "determinism.cudnn_deterministic": [(True, ON_CPU, "world.device is 'cpu'")],
    "determinism.tf32": [(True, ON_CPU, "world.device is 'cpu'")],
    "determinism.reduced_precision_reduction": [(True, ON_CPU, "world.device is 'cpu'")],
    "checkpoint.keep": [
        (n, CHECKPOINTS_OFF, "checkpoint.every_steps and checkpoint.every_epochs are null") for n in (1, 2)
    ],
    "agreement.snapshot_every": [
        (10, EVERY_0, "agreement.every is 0"),
        (50, EVERY_0, "agreement.every is 0"),
        (10, "agreement: {expect: independent}", "agreement.expect is 'independent'"),
        (10, "seed: {model: distinct}", "seed.model is 'distinct', so states may differ"),
        (10, "seed: {model: [1, 2]}", "seed.model is [1, 2], so states may differ"),
    ],
    "agreement.on_divergence": [(mode, EVERY_0, "agreement.every is 0") for mode in ("stop", "continue")],
    "run.reference": [("runs/a", EVERY_0, "agreement.every is 0")],
    "inject.tensor": [
        ("0.weight", FAULT % name, f"inject.0.target is '{name}'") for name in ("batch", "indices", "rng")
    ],
    "inject.bits": [
        (3, "inject: [{replica: 1, step: 3, target: weights, bit: 30}]", "inject.0.bit is 30"),
        (3, "inject: [{replica: 1, step: 3, target: weights, scale: 1.5}]", "inject.0.scale is 1.5"),
    ],
    "inject.bit": [(3, "inject: [{replica: 1, step: 3, target: weights, scale: 1.5}]", "inject.0.scale is 1.5")],
    "inject.step": [(8, f"{FAULT % 'weights'}\ntrain: {{max_steps: 7}}", "train.max_steps is 7")],
}
"""Settings, and each kind of setting with which they have no effect: value, the rest of the config, the reason."""

ACCEPTED = {
    "name alone": "model: {name: resnet34}",
    "name with a factory that is null": "model: {name: resnet34, factory: null}",
    "augment seed with augmentation": "seed: {augment: 3}\ndata: {name: CIFAR10, augment: flip}",
    "root of a folder": "data: {name: imagefolder, root: folder}",
    "stop before the last step": "run: {stop_after: 6}\ntrain: {max_steps: 7}",
    "one sample per micro-batch": "train: {accumulate: 16}\ndata: {batch_size: 16}",
    "filling off with mode off": "determinism: {mode: off, fill_uninitialized_memory: false}",
    "workspace null with mode off": "determinism: {mode: off, cublas_workspace_config: null}",
    "filling with mode warn": "determinism: {mode: warn, fill_uninitialized_memory: true}",
    "GPU flags off on the CPU": "world: {device: cpu}\ndeterminism: {tf32: false, cudnn_benchmark: false}",
    "GPU flags without a device": "determinism: {tf32: true, cudnn_benchmark: true}",
    "keep with steps": "checkpoint: {every_epochs: null, every_steps: 5, keep: 3}",
    "no snapshots and no comparison": "agreement: {every: 0, snapshot_every: 0}",
    "no snapshots of independent replicas": "agreement: {expect: independent, snapshot_every: 0}",
    "snapshots of equal seeds in a list": "seed: {model: [1, 1]}\nagreement: {snapshot_every: 5}",
    "snapshots of distinct seeds that must agree": (
        "seed: {model: distinct}\nagreement: {expect: identical, snapshot_every: 5}"
    ),
    "named tensor": "inject: [{replica: 1, step: 3, target: weights, tensor: 0.weight}]",
    "named module": "inject: [{replica: 1, step: 3, target: activation, tensor: '5'}]",
    "chosen bits of an element": "inject: [{replica: 1, step: 3, target: weights, element: 17, bits: 3}]",
    "named operator": "inject: [{replica: 1, step: 3, target: operator, tensor: aten.relu.default, scale: 1.5}]",
    "fault in the last step": "inject: [{replica: 1, step: 7, target: weights}]\ntrain: {max_steps: 7}",
    "step of a schedule": "schedule: {name: StepLR, step_size: 3, per: step}",
    "an override with the others' setting": "model: {name: resnet34}\noverrides: {1: {model: {factory: 'm:f'}}}",
    "nothing": "",
}


def with_value(key: str, value: Any, rest: str) -> dict[str, Any]:
    values = yaml.safe_load(rest) or {}
    section, _, name = key.partition(".")
    rows = values.setdefault(section, {})
    (rows[0] if section == "inject" else rows)[name] = value
    return values


def as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values).replace("mode: false", "mode: off")  # PyYAML reads off as false


def test_every_field_is_in_one_of_the_tables() -> None:
    fields = {
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
    fields |= {f"inject.{key}" for key in FaultConfig.model_fields}
    assert ALWAYS.keys() | IGNORED.keys() == fields
    assert not ALWAYS.keys() & IGNORED.keys()
    assert {key for rule in RULES for key in rule.keys} <= IGNORED.keys()


CASES = [(key, *row) for key, rows in IGNORED.items() for row in rows]


@pytest.mark.parametrize(("key", "value", "rest", "reason"), CASES, ids=[f"{c[0]}={c[1]} {c[3]}" for c in CASES])
def test_chosen_setting_without_effect_is_an_error(
    key: str, value: Any, rest: str, reason: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, as_yaml(with_value(key, value, rest)))
    dotted = key.replace("inject.", "inject.0.")
    assert (error.code, error.fields["key"], error.fields["value"]) == (CODE, dotted, value)
    assert error.fields["reason"].startswith(reason)
    assert error.fields["fix"]
    assert str(error).startswith(f"{tmp_path / 'job.yaml'}: {dotted}: ")
    assert f" has no effect because {reason}" in str(error)


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_setting_with_effect_is_accepted(text: str, tmp_path: Path) -> None:
    load(tmp_path, text)


def test_faults_without_comparison_are_an_error(tmp_path: Path) -> None:
    error = refusal(tmp_path, f"{EVERY_0}\n{FAULT % 'weights'}")
    assert (error.code, error.fields["key"]) == (CODE, "inject")


def test_override_without_effect_names_the_replica(tmp_path: Path) -> None:
    error = refusal(tmp_path, f"{MODE_OFF}\noverrides: {{1: {{determinism: {{fill_uninitialized_memory: true}}}}}}")
    assert (error.code, error.fields["key"]) == (CODE, "overrides.1.determinism.fill_uninitialized_memory")
    load(tmp_path, "overrides: {1: {determinism: {mode: off}}}\ndeterminism: {fill_uninitialized_memory: true}")


def test_several_settings_are_listed(tmp_path: Path) -> None:
    error = refusal(tmp_path, "model: {name: vgg11, factory: 'm:f'}\nseed: {augment: 3}")
    assert [item.fields["key"] for item in error.fields["errors"]] == ["model.name", "seed.augment"]


@pytest.mark.parametrize("config", [(), ("--config=configs/digits.yaml",), ("--config", "digits")])
def test_command_line_replaces_what_a_packaged_config_sets(config: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    loaded = load_config([*config, "--model.factory=m:f", "--data.name=m:g", "--replica.factory=m:h"], 2)
    assert (loaded.model.factory, loaded.model.name) == ("m:f", "resnet18")
    assert loaded.given == {"model.factory", "data.name", "replica.factory"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.name=resnet34", "--model.factory=m:f"],
        ["--config=configs/cifar10.yaml", "--model.name=resnet34"],
        ["--model={name: resnet34, factory: 'm:f'}"],
        ["--overrides.1.model.name=resnet34", "--model.factory=m:f"],
    ],
)
def test_two_settings_of_the_command_line_conflict(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^command line: .*model.name: 'resnet34' has no effect") as caught:
        load_config(arguments, 2)
    assert caught.value.code == CODE


def test_users_file_conflicts_with_command_line(tmp_path: Path) -> None:
    text = "model: {name: resnet34}"
    error = refusal(tmp_path, text, "--model.factory=m:f")
    assert error.fields["source"] == str(tmp_path / "job.yaml")
    assert load(tmp_path, text, "--model={factory: 'm:f'}").model.factory == "m:f", "a whole section replaces it"


def test_written_config_can_be_loaded_and_changed(tmp_path: Path) -> None:
    config = load_config(["--model.factory=m:f", "--determinism.mode=off", "--checkpoint={every_epochs: null}"], 2)
    assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, config.to_yaml(), "--agreement.every=0").agreement.every == 0
    error = refusal(tmp_path, config.to_yaml(), "--model.name=resnet34")
    assert (error.code, error.fields["source"]) == (CODE, "command line")


def test_given_keys_of_a_replica_include_its_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, "optim: {lr: 0.5}\noverrides: {1: {optim: {momentum: 0.5}, data: {num_workers: 1}}}")
    assert config.given == {"optim.lr"}
    assert config.for_replica(0).given == {"optim.lr"}
    assert config.for_replica(1).given == {"optim.lr", "optim.momentum", "data.num_workers"}


def test_config_from_a_pipe_is_read_once(tmp_path: Path) -> None:
    import os
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("model: {name: resnet34, factory: 'm:f'}",), daemon=True)
    writer.start()
    with pytest.raises(UsageError, match=r"model.name: 'resnet34' has no effect"):
        load_config([f"--config={path}"], 2)
    writer.join(5)


def test_ignored_setting_names_all_keys() -> None:
    error = ignored_setting(["optim.lr", "optim.name"], "a is b", "Remove them.")
    assert str(error) == "optim.lr: this and optim.name have no effect because a is b. Remove them."
    assert str(ignored_setting(["a.b"], "c is d", "Fix.")) == "a.b: this setting has no effect because c is d. Fix."


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("configs/**/*.yaml")), ids=lambda path: path.stem
)
def test_packaged_configs_as_users_own_have_no_conflict(path: Path, tmp_path: Path) -> None:
    load(tmp_path, path.read_text(), num_replicas=3)
