"""Errors about config keys as data, and hints for misspelled names."""

import pickle

import pytest

from dreplica.config.messages import (
    COMMAND_LINE,
    closest,
    config_error,
    invalid_value,
    join_errors,
    locate,
    nearest,
    show,
)


def test_config_error_renders_text_from_fields() -> None:
    error = config_error("some-code", "optim.lr", "something is wrong", "Fix it.", source="job.yaml", value=3)
    assert str(error) == "job.yaml: optim.lr: something is wrong. Fix it."
    assert error.code == "some-code"
    assert error.fields == {
        "key": "optim.lr",
        "problem": "something is wrong",
        "fix": "Fix it.",
        "source": "job.yaml",
        "value": 3,
    }


def test_config_error_without_source_or_fix() -> None:
    assert str(config_error("some-code", "optim.lr", "something is wrong")) == "optim.lr: something is wrong."


def test_invalid_value_names_expected_and_given() -> None:
    error = invalid_value("train.epochs", "many", "an integer")
    assert str(error) == "train.epochs: expected an integer, got 'many'."
    assert (error.code, error.fields["value"], error.fields["expected"]) == ("invalid-value", "many", "an integer")


def test_locate_adds_source_and_prefix() -> None:
    error = locate(invalid_value("optim.lr", -1, "a value >= 0"), COMMAND_LINE, "overrides.1.")
    assert str(error) == "command line: overrides.1.optim.lr: expected a value >= 0, got -1."
    assert (error.code, error.fields["key"]) == ("invalid-value", "overrides.1.optim.lr")


def test_join_errors_lists_each() -> None:
    one, two = (invalid_value(key, -1, "a value >= 0") for key in ("a", "b"))
    assert join_errors([one]) is one
    joined = join_errors([one, two])
    assert str(joined) == f"{one}\n  {two}"
    assert joined.fields["errors"] == [one, two]


def test_error_survives_pickling() -> None:
    error = invalid_value("train.epochs", "many", "an integer")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.code, copied.fields) == (str(error), error.code, error.fields)


@pytest.mark.parametrize(
    ("word", "match"),
    [("Adma", "Adam"), ("adamw", "AdamW"), ("adamx", "Adamax"), ("SGDD", "SGD"), ("zzz", None), ("", None)],
)
def test_closest_finds_misspelled_name(word: str, match: str | None) -> None:
    assert closest(word, ["Adam", "Adamax", "AdamW", "SGD"]) == match


def test_closest_respects_cutoff() -> None:
    assert closest("model", ["nodes"]) == "nodes"
    assert closest("model", ["nodes"], cutoff=0.85) is None


def test_closest_prefers_unique_prefix() -> None:
    assert closest("batch", ["batch-differs", "build-not-seeded", "bath"]) == "batch-differs"
    assert closest("Adam", ["Adam", "Adamax"]) == "Adam"
    assert closest("b", ["bench", "burn-in"]) is None
    assert closest("--at", ["--at-step", "--keep"], cutoff=0.85) == "--at-step"


def test_nearest_suggests_or_lists() -> None:
    assert nearest("b", ["abc", "xyz"]) == "Choose one of: abc, xyz."
    assert nearest("abd", ["abc", "xyz"]) == "Did you mean 'abc'?"
    names = [f"name{index:02}" for index in range(30)]
    assert nearest("zzz", names) == f"Choose one of: {', '.join(names[:20])}, …"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), ("a", "'a'"), (1.5, "1.5"), ("a" * 99, "'" + "a" * 78 + "…")]
)
def test_show_writes_yaml(value: object, text: str) -> None:
    assert show(value) == text
