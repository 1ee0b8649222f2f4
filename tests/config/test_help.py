"""The help text of the config."""

import re

import pytest

from dreplica.config.help import format_help, help_topic
from dreplica.config.schema import FaultConfig, RunConfig
from dreplica.errors import UsageError


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


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_format_help_describes_one_section(section: str) -> None:
    text = format_help("train.py", section)
    assert text.startswith("usage: train.py [--config FILE]")
    assert {name for name in RunConfig.model_fields if f"--{name}" in text} == {section}


def test_format_help_describes_keys_of_a_fault() -> None:
    text = format_help("train.py", "inject")
    assert all(f"\n  {key} " in text for key in FaultConfig.model_fields)
    assert "Replica id. (required)" in text


@pytest.mark.parametrize(
    ("section", "hint"),
    [
        ("optm", "no section 'optm'. Did you mean 'optim'?"),
        ("lr", "no section 'lr'. Did you mean 'optim'?"),
        ("xyz", "no section 'xyz'. Choose one of: agreement, "),
    ],
)
def test_format_help_refuses_unknown_section(section: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        format_help("train.py", section)
    assert str(caught.value).startswith(f"--help: {hint}")
    assert caught.value.code == "unknown-name"


@pytest.mark.parametrize(
    ("argv", "topic"),
    [
        ([], None),
        (["--optim.lr=1"], None),
        (["--help"], ""),
        (["-h", "--optim.lr=1"], ""),
        (["--help", "optim"], "optim"),
        (["--train.epochs=2", "--help=optim"], "optim"),
    ],
)
def test_help_topic(argv: list[str], topic: str | None) -> None:
    assert help_topic(argv) == topic
