"""Loading the config: values, precedence, overrides, errors and help."""

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
    """Load the config of a YAML file with `text` and of command-line arguments."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config([f"--config={path}", *arguments], num_replicas)


def refusal(tmp_path: Path, text: str, *arguments: str, num_replicas: int = 2) -> UsageError:
    """Return the error of an invalid config, whose text must not show internals of pydantic or Python."""
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *arguments, num_replicas=num_replicas)
    message = message_of(caught.value, tmp_path)
    assert not message.endswith("..")
    for inside in ("constrained", "[int]", "literal[", "Section", "Config", "pydantic", "Traceback", "Errno"):
        assert inside not in message
    return caught.value


def message_of(error: UsageError, tmp_path: Path) -> str:
    return str(error).replace(f"{tmp_path}/", "")


INVALID_FILES = {
    "unknown key": ("optim: {lr: 0.1}\ntrain: {epoch: 3}", "unknown-key", "train.epoch", "Did you mean 'epochs'?"),
    "unknown section": ("trian: {epochs: 3}", "unknown-key", "trian", "Did you mean 'train'?"),
    "key without section": ("epochs: 3", "unknown-key", "epochs", "Did you mean train.epochs?"),
    "key in another section": ("train: {lr: 3}", "unknown-key", "train.lr", "Did you mean optim.lr?"),
    "wrong type": ("train: {epochs: many}", "invalid-value", "train.epochs", "expected an integer, got 'many'."),
    "float for an int": ("train: {epochs: 2.5}", "invalid-value", "train.epochs", "got 2.5"),
    "number for a section": ("train: 3", "invalid-value", "train", "expected keys with values, such as train.epochs"),
    "negative learning rate": ("optim: {lr: -1}", "invalid-value", "optim.lr", "expected a value >= 0, got -1."),
    "unknown choice": (
        "determinism: {mode: strickt}",
        "invalid-value",
        "determinism.mode",
        "expected 'strict', 'warn' or 'off', got 'strickt'. Did you mean 'strict'?",
    ),
    "duplicate key": ("train:\n  epochs: 1\n  epochs: 2", "invalid-yaml", None, "line 3, column 3: invalid YAML: dup"),
    "duplicate section": ("train: {}\noptim: {}\ntrain: {}", "invalid-yaml", None, "line 3, column 1: invalid YAML: d"),
    "not YAML": ("train: {epochs: 1\noptim: [", "invalid-yaml", None, "line 2, column 6: invalid YAML:"),
    "tab": ("train:\n\tepochs: 1", "invalid-yaml", None, "line 2, column 1: invalid YAML:"),
    "list at the top": ("- train", "invalid-value", "job.yaml", "expected sections such as `train:`, got ['train']"),
    "word at the top": ("train", "invalid-value", "job.yaml", "expected sections such as `train:`, got 'train'"),
    "unknown optimizer": ("optim: {name: Adma}", "unknown-name", "optim.name", "'Adma'. Did you mean 'Adam'?"),
    "unknown schedule": ("schedule: {name: StepLr}", "unknown-name", "schedule.name", "Did you mean 'StepLR'?"),
    "unknown criterion": (
        "criterion: {name: CrossEntropy}",
        "unknown-name",
        "criterion.name",
        "'CrossEntropy'. Did you mean 'CrossEntropyLoss'?",
    ),
    "unknown argument": (
        "optim: {name: SGD, momentun: 0.9}",
        "unknown-key",
        "optim.momentun",
        "SGD has no argument 'momentun'. Did you mean 'momentum'?",
    ),
    "value the class rejects": ("optim: {name: SGD, momentum: -1}", "rejected-value", "optim", "optim.momentum = -1"),
    "override of a missing replica": (
        "overrides: {2: {optim: {lr: 1}}}",
        "unknown-replica",
        "overrides.2",
        "expected a replica from 0 to 1, got 2. Start 3 replicas",
    ),
    "override of a negative replica": (
        "overrides: {-1: {optim: {lr: 1}}}",
        "unknown-replica",
        "overrides.-1",
        "expected a replica from 0 to 1, got -1.",
    ),
    "override of a word": ("overrides: {one: {optim: {lr: 1}}}", "invalid-value", "overrides.one", "got 'one'"),
    "override of a shared key": (
        "overrides: {1: {data: {batch_size: 8}}}",
        "shared-key",
        "overrides.1.data.batch_size",
        "expected 64 as on the other replicas, got 8. Set data.batch_size instead",
    ),
    "override of an unknown key": (
        "overrides: {1: {optim: {lr: 0.1}, train: {acumulate: 2}}}",
        "unknown-key",
        "overrides.1.train.acumulate",
        "Did you mean 'accumulate'?",
    ),
    "override of an unknown section": (
        "overrides: {1: {optin: {lr: 1}}}",
        "unknown-key",
        "overrides.1.optin",
        "Did you mean 'optim'?",
    ),
    "override with an invalid value": (
        "overrides: {1: {optim: {lr: -2}}}",
        "invalid-value",
        "overrides.1.optim.lr",
        "expected a value >= 0, got -2.",
    ),
    "override with a number for a section": (
        "overrides: {1: {optim: 3}}",
        "invalid-value",
        "overrides.1.optim",
        "expected keys with values, such as optim.name, got 3.",
    ),
    "override of the seed": ("overrides: {1: {seed: {model: 1}}}", "shared-key", "overrides.1.seed.model", "got 1."),
    "override of init": (
        "overrides: {1: {model: {init: broadcast}}}",
        "shared-key",
        "overrides.1.model.init",
        "Set model.init instead",
    ),
    "override of a name that a factory replaces": (
        "model: {factory: 'm:f'}\noverrides: {1: {model: {name: resnet34}}}",
        "ignored-key",
        "overrides.1.model.name",
        "'resnet34' has no effect because model.factory is 'm:f'. Set overrides.1.model.factory to null",
    ),
    "faults in an override": (
        "overrides: {1: {inject: [{replica: 1, step: 1, target: weights}]}}",
        "faults-in-override",
        "overrides.1.inject",
        "section inject, with replica: 1.",
    ),
    "override with a key that is no text": (
        "overrides: {1: {train: {2: 3}}}",
        "unknown-key",
        "overrides.1.train.2",
        "unknown key, expected text. Choose one of: accumulate,",
    ),
    "override with a section that is no text": (
        "overrides: {1: {2: 3}}",
        "unknown-key",
        "overrides.1.2",
        "expected te",
    ),
    "nested overrides": (
        "overrides: {1: {overrides: {}}}",
        "nested-overrides",
        "overrides.1.overrides",
        "cannot be nested",
    ),
    "too few seeds": (
        "seed: {model: [1, 2, 3]}",
        "invalid-value",
        "seed.model",
        "expected 2 seeds for 2 replicas, got 3: [1, 2, 3]. Use one seed per replica",
    ),
    "seed of no type": (
        "seed: {model: 1.5}",
        "invalid-value",
        "seed.model",
        "expected an integer or a list, such as [1, 2] or 'distinct', got 1.5.",
    ),
    "negative seed in a list": ("seed: {model: [1, -2]}", "invalid-value", "seed.model.1", "value >= 0, got -2"),
    "number as a key": ("1: 2", "unknown-key", "1", "expected text. Choose one of: agreement, "),
    "null as a key": ("~: 1", "unknown-key", "null", "expected text. Choose one of: agreement, "),
    "bool as a key of a section": ("train: {true: 1}", "unknown-key", "train.true", "expected text. Choose one of: "),
    "number as an argument": ("optim: {1: 2}", "unknown-key", "optim.1", "unknown key, expected text."),
    "fault without a step": (
        "inject: [{replica: 1, target: weights}]",
        "missing-value",
        "inject.0.step",
        "a value is required. Add step: VALUE.",
    ),
    "fault on a missing replica": (
        "inject: [{replica: 4, step: 1, target: weights}]",
        "unknown-replica",
        "inject.0.replica",
        "expected a replica from 0 to 1, got 4. Start 5 replicas, or choose another one.",
    ),
    "faults that are no list": (
        "inject: {replica: 1}",
        "invalid-value",
        "inject",
        "a list, such as [{replica: …, step: …, target: …}], got {'replica': 1}.",
    ),
    "infinite learning rate": ("optim: {lr: .inf}", "invalid-value", "optim.lr", "expected a finite number, got inf."),
    "deep nesting": (f"train: {'[' * 3000}{']' * 3000}", "invalid-yaml", None, "invalid YAML: nested too deeply."),
    "NUL in a path": ('run: {root: "a\\0b"}', "invalid-yaml", None, "line 1, column 13: invalid YAML: invalid char"),
    "empty root": ("run: {root: ''}", "invalid-value", "run.root", "expected a folder, got ''. Use '.'"),
    "surrogate": (
        'run: {name: "\\ud800"}',
        "invalid-yaml",
        None,
        "column 13: invalid YAML: invalid character '\\ud800'",
    ),
    "invalid date": ("run: {name: !!timestamp 2026-99-99}", "invalid-yaml", None, "job.yaml: invalid YAML: month"),
    "value in itself": (
        "overrides: {1: &a {optim: &b {name: Adam, betas: *b}}}",
        "invalid-value",
        "overrides.1.optim.betas",
        "{...}",
    ),
    "infinite timeout": (
        "world: {timeout: .inf}",
        "invalid-value",
        "world.timeout",
        "expected a value <= 86400, got inf",
    ),
}


@pytest.mark.parametrize(("text", "code", "key", "part"), INVALID_FILES.values(), ids=INVALID_FILES.keys())
def test_load_refuses_file(tmp_path: Path, text: str, code: str, key: str | None, part: str) -> None:
    error = refusal(tmp_path, text)
    message = message_of(error, tmp_path)
    assert error.code == code
    assert key is None or error.fields["key"].removeprefix(f"{tmp_path}/") == key
    assert part in message
    assert message.startswith(f"job.yaml: {key}:" if key not in {None, "job.yaml"} else "job.yaml:")
    assert "\n" not in message


def test_invalid_value_error_has_fields(tmp_path: Path) -> None:
    error = refusal(tmp_path, "determinism: {mode: strickt}")
    assert str(error) == (
        f"{tmp_path}/job.yaml: determinism.mode: expected 'strict', 'warn' or 'off', got 'strickt'. "
        "Did you mean 'strict'?"
    )
    assert error.fields == {
        "key": "determinism.mode",
        "value": "strickt",
        "expected": "'strict', 'warn' or 'off'",
        "problem": "expected 'strict', 'warn' or 'off', got 'strickt'",
        "fix": "Did you mean 'strict'?",
        "source": f"{tmp_path}/job.yaml",
    }


INVALID_ARGUMENTS = {
    "no value": (["--optim.lr"], "missing-value", "--optim.lr: a value is required. Write --optim.lr VALUE."),
    "option as a value": (["--optim.lr", "--train.epochs=1"], "missing-value", "--optim.lr: a value is required"),
    "stray word": (["train"], "invalid-value", "command line: expected --section.key VALUE, got 'train'. See --help."),
    "one dash": (["-x", "3"], "invalid-value", "got '-x'"),
    "nothing after the dashes": (["--"], "invalid-value", "got '--'"),
    "given twice": (["--optim.lr=1", "--optim.lr", "2"], "repeated-option", "--optim.lr: given twice, as '1' and '2'"),
    "given alone and in its section": (
        ["--train.epochs=1", "--train={epochs: 3}"],
        "repeated-option",
        "command line: train.epochs: given twice, as 3 and 1. Keep one.",
    ),
    "given alone and in its section, within an override": (
        ["--overrides.1.optim.lr=2", "--overrides.1={optim: {lr: 1}}"],
        "repeated-option",
        "command line: overrides.1.optim.lr: given twice, as 1 and 2",
    ),
    "given twice for one replica": (
        ["--overrides.1.optim.lr=2", "--overrides.01.optim.lr=1"],
        "repeated-option",
        "optim.lr: given twice, as 2 and 1",
    ),
    "key of a section that is a number": (
        ["--train.epochs=1", "--train=3"],
        "repeated-option",
        "command line: --train.epochs: conflicts with 3, given for all of train",
    ),
    "single dot": (["--.", "1"], "invalid-value", "got '--.'"),
    "key without the section's name": (["--.epochs=1"], "invalid-value", "got '--.epochs=1'"),
    "two dots": (["--train..epochs=1"], "invalid-value", "got '--train..epochs=1'"),
    "replica id of 5000 digits": ([f"--overrides.{'9' * 5000}.optim.lr=1"], "invalid-value", "expected an integer"),
    "--config twice": (["--config=other.yaml"], "repeated-option", "--config: given twice"),
    "unknown key": (["--optim.Lr=1"], "unknown-key", "optim.Lr: SGD has no argument 'Lr'. Did you mean 'lr'?"),
    "unknown section": (["--optin.lr=1"], "unknown-key", "command line: optin: unknown key. Did you mean 'optim'?"),
    "no section": (["--epochs=1"], "unknown-key", "command line: epochs: unknown key. Did you mean train.epochs?"),
    "dash in a key": (
        ["--train.max-steps=1"],
        "unknown-key",
        "train.max-steps: unknown key. Did you mean 'max_steps'?",
    ),
    "not YAML": (["--seed.model=[1,"], "invalid-yaml", "--seed.model: line 1, column 4: invalid YAML"),
    "integer of 5000 digits": (["--train.epochs=" + "9" * 5000], "invalid-yaml", "--train.epochs: invalid YAML"),
    "negative number": (["--optim.lr", "-1e-3"], "invalid-value", "optim.lr: expected a value >= 0, got -0.001."),
    "replica id that is no number": (
        ["--overrides.².optim.lr=1"],
        "invalid-value",
        "command line: overrides.²: expected",
    ),
    "missing replica": (
        ["--overrides.2.optim.lr=1"],
        "unknown-replica",
        "command line: overrides.2: expected a replica",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "part"), INVALID_ARGUMENTS.values(), ids=INVALID_ARGUMENTS.keys())
def test_load_refuses_argument(tmp_path: Path, arguments: list[str], code: str, part: str) -> None:
    error = refusal(tmp_path, "", *arguments)
    message = message_of(error, tmp_path)
    assert error.code == code
    assert part in message
    assert message.startswith("command line: ")
    assert "\n" not in message


def test_load_lists_each_wrong_key_with_its_source(tmp_path: Path) -> None:
    error = refusal(tmp_path, "train: {epochs: 0}", "--optim.lr=-1")
    first, second = message_of(error, tmp_path).split("\n")
    assert error.code == "invalid-config"
    assert {item.fields["key"] for item in error.fields["errors"]} == {"train.epochs", "optim.lr"}
    assert sorted([first.strip(), second.strip()]) == [
        "command line: optim.lr: expected a value >= 0, got -1.",
        "job.yaml: train.epochs: expected a value >= 1, got 0.",
    ]


def test_load_lists_each_wrong_key_of_an_override(tmp_path: Path) -> None:
    error = refusal(tmp_path, "overrides: {1: {train: {accumulate: 0}, optim: {lr: -1}}}")
    assert {line.strip() for line in message_of(error, tmp_path).split("\n")} == {
        "job.yaml: overrides.1.optim.lr: expected a value >= 0, got -1.",
        "job.yaml: overrides.1.train.accumulate: expected a value >= 1, got 0.",
    }


@pytest.mark.parametrize(
    ("make", "code", "part"),
    [
        (lambda path: None, "unknown-config", "Correct the path, or use one of: cifar10, digits, "),
        (lambda path: path.mkdir(), "unreadable-file", "cannot be read (Is a directory). Name a YAML file"),
        (lambda path: path.write_bytes(b"\x80\x04\x95\xff\xfe"), "unreadable-file", "is not text"),
        (lambda path: path.write_bytes(b"train:\n  \x00\x01"), "invalid-yaml", "line 2, column 3: invalid YAML"),
    ],
    ids=["missing", "folder", "binary", "binary but UTF-8"],
)
def test_load_refuses_config_that_is_no_yaml_file(tmp_path: Path, make: object, code: str, part: str) -> None:
    path = tmp_path / "job.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError) as caught:
        load_config([f"--config={path}"], 2)
    message = str(caught.value)
    assert caught.value.code == code
    assert part in message
    assert "job.yaml" in message
    assert "\n" not in message


def test_read_yaml_follows_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("[1e-3, 5E2, -.5, 010, 08, 0x1F, 0o17, off, no, yes, ~, null, true, 1_000, 1:30, .inf, -1]")
    with pytest.raises(UsageError, match="expected sections"):
        read_yaml(path)
    path.write_text("values: " + path.read_text())
    expected = [0.001, 500.0, -0.5, 10, 8, 31, 15, "off", "no", "yes", None, None, True, "1_000", "1:30", float("inf")]
    values = read_yaml(path)["values"]
    assert values == [*expected, -1]
    assert [type(value) for value in values] == [type(value) for value in [*expected, -1]]


@pytest.mark.parametrize("spelling", ["1e-3", "0.001", "1E-3", ".001"])
def test_number_is_equal_in_file_and_on_command_line(tmp_path: Path, spelling: str) -> None:
    assert load(tmp_path, f"optim: {{lr: {spelling}}}").optim.lr == 0.001
    assert load(tmp_path, "", f"--optim.lr={spelling}").optim.lr == 0.001
    assert load(tmp_path, "", "--optim.lr", spelling).optim.lr == 0.001


def test_mode_off_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, "determinism: {mode: off}").determinism.mode == "off"
    assert load(tmp_path, "", "--determinism.mode", "off").determinism.mode == "off"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "train:\noptim:\noverrides:\n", "train: {}"])
def test_empty_file_or_section_means_defaults(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert config.run.name == "job"
    assert config.model_copy(update={"run": RunConfig().run}) == RunConfig()


def test_command_line_overrides_file(tmp_path: Path) -> None:
    text = "optim: {name: SGD, lr: 0.5, momentum: 0.9}\nschedule: {name: StepLR, step_size: 3}"
    config = load(tmp_path, text, "--optim.lr=0.25", "--schedule={}", "--seed.model=[3, 4]")
    assert config.optim.lr == 0.25
    assert config.optim.arguments["momentum"] == 0.9
    assert config.schedule.name is None
    assert config.seed.model == [3, 4]


def test_key_overrides_whole_section_on_command_line(tmp_path: Path) -> None:
    for arguments in (["--optim.lr=1", "--optim={name: Adam}"], ["--optim={name: Adam}", "--optim.lr=1"]):
        config = load(tmp_path, "optim: {lr: 0.5}", *arguments)
        assert (config.optim.name, config.optim.lr) == ("Adam", 1)


def test_renamed_optimizer_drops_old_arguments(tmp_path: Path) -> None:
    config = load(tmp_path, "optim: {name: SGD, lr: 0.5, momentum: 0.9}", "--optim.name=Adam")
    assert config.optim.arguments == {"lr": 0.5}
    for arguments in (
        ["--optim.weight_decay=0.1", "--optim.name=Adam"],
        ["--optim.name=Adam", "--optim.weight_decay=0.1"],
    ):
        assert load(tmp_path, "optim: {lr: 0.5}", *arguments).optim.arguments == {"lr": 0.5, "weight_decay": 0.1}


def test_override_changes_only_its_replica(tmp_path: Path) -> None:
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
def test_empty_override_declares_nothing(tmp_path: Path, nothing: str) -> None:
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
"""Keys in which replicas may differ. The run reads them from `Prepared.own`."""


def test_each_key_is_shared_or_can_be_overridden(tmp_path: Path) -> None:
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


def test_to_yaml_round_trips(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-3, momentum: 0.9}\nseed: {model: [1, 2]}\noverrides: {1: {determinism: {mode: off}}}"
    config = load(tmp_path, text)
    assert load(tmp_path, config.to_yaml()) == config


def test_help_lists_each_field_with_docstring_and_default() -> None:
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
        "--overrides VALUE Partial config for single replicas, by replica id",
        "--optim.lr VALUE Learning rate. (default: 0.01)",
        "A suffix is added if the name is taken and the run does not resume. (default: null)",
        "--determinism.cublas_workspace_config VALUE Value for the environment variable CUBLAS_WORKSPACE_CONFIG",
    ):
        assert squeeze(line) in text
