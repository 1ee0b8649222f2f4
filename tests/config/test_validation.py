"""Validation errors: each names the key as the user writes it, the value and the fix."""

from pathlib import Path

import pytest

from tests.config.loading import message_of, refusal

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
        "ignored-setting",
        "overrides.1.model.name",
        "'resnet34' has no effect because model.factory is 'm:f'. Remove it, or set model.factory to null.",
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
    "faulty operator without a name": (
        "inject: [{replica: 1, step: 1, target: operator}]",
        "missing-value",
        "inject.0.tensor",
        "target 'operator' requires a value. Name an operator, such as aten.relu.default.",
    ),
    "factor that changes nothing": (
        "inject: [{replica: 1, step: 1, target: weights, scale: 1.0}]",
        "invalid-value",
        "inject.0.scale",
        "expected a factor other than 1, got 1.0.",
    ),
    "infinite factor": (
        "inject: [{replica: 1, step: 1, target: weights, scale: .inf}]",
        "invalid-value",
        "inject.0.scale",
        "expected a finite number, got inf.",
    ),
    "scaled indices": (
        "inject: [{replica: 1, step: 1, target: indices, scale: 2}]",
        "unscalable-target",
        "inject.0.scale",
        "the elements of target 'indices' are integers, which cannot be scaled. Use bit.",
    ),
    "negative element": (
        "inject: [{replica: 1, step: 1, target: weights, element: -1}]",
        "invalid-value",
        "inject.0.element",
        "expected a value >= 0, got -1.",
    ),
    "bit that no element has": (
        "inject: [{replica: 1, step: 1, target: weights, bit: 64}]",
        "invalid-value",
        "inject.0.bit",
        "expected a value <= 63, got 64.",
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
