"""Config: what is read, what is refused, and what a user is told."""

import re
from pathlib import Path

import pytest
import yaml

from dreplica.config.base import Lockstep
from dreplica.config.help import format_help
from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.config.yaml import read_yaml
from dreplica.errors import UsageError

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


def load(tmp_path: Path, text: str, *arguments: str, num_replicas: int = 2) -> RunConfig:
    """The config of a YAML file with `text`, and of `arguments`."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config([f"--config={path}", *arguments], num_replicas)


def refusal(tmp_path: Path, text: str, *arguments: str, num_replicas: int = 2) -> str:
    """The message with which it is refused, with nothing of pydantic's or Python's insides in it."""
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *arguments, num_replicas=num_replicas)
    message = str(caught.value).replace(str(tmp_path), "")
    assert not message.endswith("..")
    for inside in ("constrained", "[int]", "literal[", "Section", "Config", "pydantic", "Traceback", "Errno"):
        assert inside not in message
    return message


REFUSED_FILES = {
    "unknown key": ("optim: {lr: 0.1}\ntrain: {epoch: 3}", ["train.epoch: unknown key", "Did you mean 'epochs'?"]),
    "unknown section": ("trian: {epochs: 3}", ["trian: unknown key", "Did you mean 'train'?"]),
    "key without its section": ("epochs: 3", ["epochs: unknown key", "Did you mean train.epochs?"]),
    "key in another section": ("train: {lr: 3}", ["train.lr: unknown key", "Did you mean optim.lr?"]),
    "wrong type": ("train: {epochs: many}", ["train.epochs: 'many' will not do: it should be a valid integer"]),
    "a float where an int belongs": ("train: {epochs: 2.5}", ["train.epochs: 2.5 will not do"]),
    "a word where a section belongs": ("train: 3", ["train: 3 will not do", "keys with values, such as train.epochs"]),
    "negative learning rate": (
        "optim: {lr: -1}",
        ["optim.lr: -1 will not do: it should be greater than or equal to 0"],
    ),
    "no such choice": (
        "determinism: {mode: strickt}",
        ["determinism.mode: 'strickt' will not do", "'strict', 'warn' or 'off'"],
    ),
    "duplicate key": ("train:\n  epochs: 1\n  epochs: 2", ["line 3, column 3", "the key 'epochs' stands twice"]),
    "duplicate section": ("train: {}\noptim: {}\ntrain: {}", ["line 3, column 1", "the key 'train' stands twice"]),
    "not YAML": ("train: {epochs: 1\noptim: [", ["line 2, column 6: this cannot be read as YAML"]),
    "a tab": ("train:\n\tepochs: 1", ["line 2, column 1: this cannot be read as YAML"]),
    "a list at the top": ("- train", ["expected sections such as `train:`, found a list"]),
    "a word at the top": ("train", ["expected sections such as `train:`, found 'train'"]),
    "unknown optimizer": ("optim: {name: Adma}", ["optim.name:", "'Adma'", "Did you mean 'Adam'?"]),
    "unknown schedule": ("schedule: {name: StepLr}", ["schedule.name:", "'StepLr'", "Did you mean 'StepLR'?"]),
    "unknown criterion": (
        "criterion: {name: CrossEntropy}",
        ["criterion.name:", "'CrossEntropy'", "Did you mean 'CrossEntropyLoss'?"],
    ),
    "argument the class does not have": (
        "optim: {name: SGD, momentun: 0.9}",
        ["optim.momentun: SGD has no argument 'momentun'", "Did you mean 'momentum'?"],
    ),
    "value the class refuses": ("optim: {name: SGD, momentum: -1}", ["optim", "SGD", "momentum = -1"]),
    "override for nobody": ("overrides: {2: {optim: {lr: 1}}}", ["overrides.2:", "no such replica", "0"]),
    "override for a negative replica": ("overrides: {-1: {optim: {lr: 1}}}", ["overrides.-1:", "no such replica"]),
    "remedy for a negative replica": ("overrides: {-1: {optim: {lr: 1}}}", ["count from 0. Override another."]),
    "override for a word": ("overrides: {one: {optim: {lr: 1}}}", ["overrides.one: 'one' will not do"]),
    "override of a shared key": (
        "overrides: {1: {data: {batch_size: 8}}}",
        ["overrides.1.data.batch_size:", "must share", "Set data.batch_size for all"],
    ),
    "override of an unknown key": (
        "overrides: {1: {optim: {lr: 0.1}, train: {acumulate: 2}}}",
        ["overrides.1.train.acumulate: unknown key", "Did you mean 'accumulate'?"],
    ),
    "override of an unknown section": ("overrides: {1: {optin: {lr: 1}}}", ["overrides.1.optin", "'optim'"]),
    "override with a value that will not do": (
        "overrides: {1: {optim: {lr: -2}}}",
        ["overrides.1.optim.lr: -2 will not do"],
    ),
    "override with a word for a section": (
        "overrides: {1: {optim: 3}}",
        ["overrides.1.optim: 3 will not do: it should be keys with values, such as optim.name."],
    ),
    "override of the seed": ("overrides: {1: {seed: {model: 1}}}", ["overrides.1.seed.model: 1 will", "must share"]),
    "override of init": (
        "overrides: {1: {model: {init: broadcast}}}",
        ["overrides.1.model.init: 'broadcast'", "must share", "Set model.init for all"],
    ),
    "override of a name that a factory hides": (
        "model: {factory: 'm:f'}\noverrides: {1: {model: {name: resnet34}}}",
        ["overrides.1.model.name: 'resnet34' changes nothing", "'m:f'", "Set overrides.1.model.factory to null"],
    ),
    "faults in an override": (
        "overrides: {1: {inject: [{replica: 1, step: 1, target: weights}]}}",
        ["overrides.1.inject:", "under inject, with replica: 1."],
    ),
    "an override's key that is no word": (
        "overrides: {1: {train: {2: 3}}}",
        ["overrides.1.train.2: unknown key; keys are words. Valid are: accumulate,"],
    ),
    "an override's section that is no word": ("overrides: {1: {2: 3}}", ["overrides.1.2: unknown key; keys are words"]),
    "overrides within overrides": ("overrides: {1: {overrides: {}}}", ["overrides.1.overrides", "do not nest"]),
    "too few seeds": (
        "seed: {model: [1, 2, 3]}",
        ["seed.model:", "[1, 2, 3]", "3 seeds for 2 replicas", "one seed per"],
    ),
    "a seed of no type": (
        "seed: {model: 1.5}",
        ["seed.model: 1.5 will not do: it should be a valid integer or a list, such as [1, 2] or 'distinct'."],
    ),
    "a negative seed in a list": ("seed: {model: [1, -2]}", ["seed.model.1: -2 will not do: it should be greater"]),
    "a key that is no word": ("1: 2", ["1: unknown key; keys are words. Valid are: agreement, "]),
    "a null for a key": ("~: 1", ["null: unknown key; keys are words. Valid are: agreement, "]),
    "a key of a section that is no word": ("train: {true: 1}", ["train.true: unknown key; keys are words. Valid are"]),
    "an argument that is no word": ("optim: {1: 2}", ["optim.1: unknown key; keys are words."]),
    "a fault without a step": (
        "inject: [{replica: 1, target: weights}]",
        ["inject.0.step: it has no value and needs one. Write step: VALUE."],
    ),
    "faults that are no list": (
        "inject: {replica: 1}",
        ["inject: {'replica': 1} will not do", "a list, such as [{replica: …, step: …, target: …}]."],
    ),
    "a learning rate without end": ("optim: {lr: .inf}", ["optim.lr: inf will not do: it should be a finite number."]),
    "deeply nested": (f"train: {'[' * 3000}{']' * 3000}", ["cannot be read as YAML: it is nested too deeply."]),
    "a NUL in a path": ('run: {root: "a\\0b"}', ["line 1, column 13: this", "that no text has, '\\x00'."]),
    "no root": ("run: {root: ''}", ["run.root: '' names no folder. Name one, or '.'"]),
    "half a character": ('run: {name: "\\ud800"}', ["line 1, column 13: this", "that no text has, '\\ud800'."]),
    "no date": ("run: {name: !!timestamp 2026-99-99}", ["/job.yaml: this cannot be read as YAML: month"]),
    "within itself": ("overrides: {1: &a {optim: &b {name: Adam, betas: *b}}}", ["optim.betas: {"]),
    "a timeout without end": ("world: {timeout: .inf}", ["world.timeout: inf will not do"]),
}


@pytest.mark.parametrize(("text", "parts"), REFUSED_FILES.values(), ids=REFUSED_FILES.keys())
def test_a_file_is_refused_with_one_line_that_names_key_value_and_remedy(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, text)
    assert [part for part in parts if part not in message] == [], message
    assert message.startswith("/job.yaml:") or "replica" in message
    assert "\n" not in message


REFUSED_ARGUMENTS = {
    "no value": (["--optim.lr"], ["--optim.lr has no value", "--optim.lr VALUE"]),
    "an option for a value": (["--optim.lr", "--train.epochs=1"], ["--optim.lr has no value"]),
    "a stray word": (["train"], ["'train' belongs to no option"]),
    "one dash": (["-x", "3"], ["'-x' belongs to no option"]),
    "nothing after the dashes": (["--"], ["'--' belongs to no option"]),
    "twice": (["--optim.lr=1", "--optim.lr", "2"], ["--optim.lr stands twice, with '1' and '2'"]),
    "alone and in its section": (
        ["--train.epochs=1", "--train={epochs: 3}"],
        ["command line: train.epochs stands twice, with 3 and 1. Keep one."],
    ),
    "alone and in its section, within an override": (
        ["--overrides.1.optim.lr=2", "--overrides.1={optim: {lr: 1}}"],
        ["command line: overrides.1.optim.lr stands twice, with 1 and 2"],
    ),
    "twice for one replica": (
        ["--overrides.1.optim.lr=2", "--overrides.01.optim.lr=1"],
        ["optim.lr stands twice, with 2 and 1"],
    ),
    "in a section that is none": (
        ["--train.epochs=1", "--train=3"],
        ["command line: --train.epochs does not go with 3, given for all of train"],
    ),
    "a dot alone": (["--.", "1"], ["'--.' belongs to no option"]),
    "a key without its section's name": (["--.epochs=1"], ["'--.epochs=1' belongs to no option"]),
    "two dots": (["--train..epochs=1"], ["'--train..epochs=1' belongs to no option"]),
    "a replica of 5000 digits": ([f"--overrides.{'9' * 5000}.optim.lr=1"], ["it should be a valid integer"]),
    "--config twice": (["--config=other.yaml"], ["--config stands twice"]),
    "unknown key": (["--optim.Lr=1"], ["command line: optim.Lr", "Did you mean 'lr'?"]),
    "unknown section": (["--optin.lr=1"], ["command line: optin: unknown key", "Did you mean 'optim'?"]),
    "no section": (["--epochs=1"], ["command line: epochs: unknown key", "Did you mean train.epochs?"]),
    "odd characters": (["--train.max-steps=1"], ["train.max-steps: unknown key", "'max_steps'"]),
    "not YAML": (["--seed.model=[1,"], ["--seed.model: line 1, column 4: this cannot be read as YAML"]),
    "an integer of 5000 digits": (["--train.epochs=" + "9" * 5000], ["--train.epochs", "cannot be read as YAML"]),
    "negative": (["--optim.lr", "-1e-3"], ["command line: optim.lr: -0.001 will not do"]),
    "replicas that are no number": (["--overrides.².optim.lr=1"], ["command line: overrides.²"]),
}


@pytest.mark.parametrize(("arguments", "parts"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS.keys())
def test_a_command_line_is_refused_alike(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    message = refusal(tmp_path, "", *arguments)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_every_wrong_key_has_its_line_and_each_says_where_it_was_given(tmp_path: Path) -> None:
    first, second = refusal(tmp_path, "train: {epochs: 0}", "--optim.lr=-1").split("\n")
    assert sorted([first.strip(), second.strip()]) == [
        "/job.yaml: train.epochs: 0 will not do: it should be greater than or equal to 1.",
        "command line: optim.lr: -1 will not do: it should be greater than or equal to 0.",
    ]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["there is no file", "Correct the path"]),
        (lambda path: path.mkdir(), ["cannot be read (Is a directory)", "Name a YAML file"]),
        (lambda path: path.write_bytes(b"\x80\x04\x95\xff\xfe"), ["is not text"]),
        (lambda path: path.write_bytes(b"train:\n  \x00\x01"), ["line 2, column 3: this cannot be read as YAML"]),
    ],
    ids=["missing", "a folder", "binary", "binary but UTF-8"],
)
def test_a_config_that_is_no_yaml_file_is_refused(tmp_path: Path, make: object, parts: list[str]) -> None:
    path = tmp_path / "job.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError) as caught:
        load_config([f"--config={path}"], 2)
    message = str(caught.value)
    assert [part for part in [*parts, "job.yaml"] if part not in message] == [], message
    assert "\n" not in message


def test_numbers_and_words_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("[1e-3, 5E2, -.5, 010, 08, 0x1F, 0o17, off, no, yes, ~, null, true, 1_000, 1:30, .inf, -1]")
    with pytest.raises(UsageError, match="found a list"):
        read_yaml(path)
    path.write_text("values: " + path.read_text())
    expected = [0.001, 500.0, -0.5, 10, 8, 31, 15, "off", "no", "yes", None, None, True, "1_000", "1:30", float("inf")]
    values = read_yaml(path)["values"]
    assert values == [*expected, -1]
    assert [type(value) for value in values] == [type(value) for value in [*expected, -1]]


@pytest.mark.parametrize("spelling", ["1e-3", "0.001", "1E-3", ".001"])
def test_a_number_is_the_same_in_the_file_and_on_the_command_line(tmp_path: Path, spelling: str) -> None:
    assert load(tmp_path, f"optim: {{lr: {spelling}}}").optim.lr == 0.001
    assert load(tmp_path, "", f"--optim.lr={spelling}").optim.lr == 0.001
    assert load(tmp_path, "", "--optim.lr", spelling).optim.lr == 0.001


def test_mode_off_is_the_word(tmp_path: Path) -> None:
    assert load(tmp_path, "determinism: {mode: off}").determinism.mode == "off"
    assert load(tmp_path, "", "--determinism.mode", "off").determinism.mode == "off"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "train:\noptim:\noverrides:\n", "train: {}"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert config.run.name == "job"
    assert config.model_copy(update={"run": RunConfig().run}) == RunConfig()


def test_the_command_line_is_laid_over_the_file(tmp_path: Path) -> None:
    text = "optim: {name: SGD, lr: 0.5, momentum: 0.9}\nschedule: {name: StepLR, step_size: 3}"
    config = load(tmp_path, text, "--optim.lr=0.25", "--schedule={}", "--seed.model=[3, 4]")
    assert config.optim.lr == 0.25
    assert config.optim.arguments["momentum"] == 0.9
    assert config.schedule.name is None
    assert config.seed.model == [3, 4]


def test_a_key_on_the_command_line_is_laid_over_a_whole_section_there_in_either_order(tmp_path: Path) -> None:
    for arguments in (["--optim.lr=1", "--optim={name: Adam}"], ["--optim={name: Adam}", "--optim.lr=1"]):
        config = load(tmp_path, "optim: {lr: 0.5}", *arguments)
        assert (config.optim.name, config.optim.lr) == ("Adam", 1)


def test_another_optimizer_does_not_inherit_the_old_ones_arguments(tmp_path: Path) -> None:
    config = load(tmp_path, "optim: {name: SGD, lr: 0.5, momentum: 0.9}", "--optim.name=Adam")
    assert config.optim.arguments == {"lr": 0.5}
    for arguments in (
        ["--optim.weight_decay=0.1", "--optim.name=Adam"],
        ["--optim.name=Adam", "--optim.weight_decay=0.1"],
    ):
        assert load(tmp_path, "optim: {lr: 0.5}", *arguments).optim.arguments == {"lr": 0.5, "weight_decay": 0.1}


def test_an_override_is_merged_into_one_replica_only(tmp_path: Path) -> None:
    text = "optim: {lr: 0.5, momentum: 0.9}\noverrides: {1: {optim: {lr: 0.25}}}"
    config = load(tmp_path, text)
    assert config.for_replica(0).optim.lr == 0.5
    assert config.for_replica(1).optim.lr == 0.25
    assert config.for_replica(1).optim.arguments["momentum"] == 0.9
    assert load(tmp_path, "", "--overrides.1.optim.lr=0.25").for_replica(1).optim.lr == 0.25


@pytest.mark.parametrize(
    "nothing",
    ["{1: {train: null}}", "{1: {data: null}}", "{1: {optim: , seed: }}", "{1: {train: {}}}", "{1: null}"],
)
def test_an_override_of_nothing_overrides_and_declares_nothing(tmp_path: Path, nothing: str) -> None:
    text = "train: {epochs: 3}\ndata: {batch_size: 7}\noptim: {lr: 0.5}"
    config = load(tmp_path, text, f"--overrides={nothing}")
    assert config.for_replica(1).model_dump(exclude={"overrides"}) == config.model_dump(exclude={"overrides"})
    assert config.overrides == {}
    assert config.for_replica(1).train.epochs == 3


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
"""Every key in which replicas may differ: the run reads it from `Prepared.own`, or it belongs in lock-step."""


def test_every_key_is_shared_or_can_be_overridden(tmp_path: Path) -> None:
    keys = {
        f"{section}.{key}": any(isinstance(mark, Lockstep) for mark in item.metadata)
        for section, field in RunConfig.model_fields.items()
        for key, item in getattr(field.annotation, "model_fields", {}).items()
    }
    assert {key for key, shared in keys.items() if not shared} == set(OVERRIDABLE)
    for key, value in OVERRIDABLE.items():
        section, _, name = key.partition(".")
        text = yaml.safe_dump({"overrides": {1: {section: {name: value}}}})
        config = load(tmp_path, text)
        own = config.for_replica(1)
        assert getattr(getattr(own, section), name) == value != getattr(getattr(config, section), name)


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-3, momentum: 0.9}\nseed: {model: [1, 2]}\noverrides: {1: {determinism: {mode: off}}}"
    config = load(tmp_path, text)
    assert load(tmp_path, config.to_yaml()) == config


def test_help_lists_every_field_with_its_docstring_and_default() -> None:
    def squeeze(text: str) -> str:
        return re.sub(r"\s", "", text)  # help is wrapped, at hyphens too

    text = squeeze(format_help("train.py"))
    missing = []
    for section, field in RunConfig.model_fields.items():
        fields = getattr(field.annotation, "model_fields", {})
        entries = {f"{section}.{key}": item for key, item in fields.items()} or {section: field}
        for name, item in entries.items():
            assert item.description, f"{name} has no docstring"
            if squeeze(f"--{name} VALUE {item.description} (default: ") not in text:
                missing.append(name)
    assert missing == []
    for line in (
        "--overrides VALUE Replica id to a partial config",
        "--optim.lr VALUE Learning rate. (default: 0.01)",
        "A second run of the same name gets a suffix, unless it resumes. (default: null)",
        "--determinism.cublas_workspace_config VALUE CUBLAS_WORKSPACE_CONFIG, set before",
    ):
        assert squeeze(line) in text
