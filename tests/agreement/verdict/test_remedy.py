"""Remedies and their catalogue."""

import pytest

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.remedy_texts import REMEDIES
from dreplica.config.paths import PACKAGE_ROOT


def test_of_makes_a_command_from_settings() -> None:
    remedy = Remedy.of("compare-every-step")
    assert remedy.command == "--agreement.every 1 --agreement.snapshot_every 10"
    assert remedy.settings == {"agreement.every": 1, "agreement.snapshot_every": 10}
    assert str(remedy) == f"{remedy.command}  # {remedy.text}"


@pytest.mark.parametrize(
    ("value", "spelled"), [(True, "true"), (None, "null"), (0.05, "0.05"), ("strict", "strict"), ("a b", "'a b'")]
)
def test_of_spells_values_as_yaml(value: object, spelled: str) -> None:
    assert Remedy.of("set-as-in-reference", settings={"run.x": value}).command == f"--run.x {spelled}"


def test_of_renders_a_command_from_data() -> None:
    remedy = Remedy.of("check-this-gpu-memory", card="GPU-1", host="node3")
    assert remedy.command == "nvidia-smi -q -i GPU-1 -d ECC,ROW_REMAPPER"
    assert remedy.text == "on host node3"
    assert remedy.settings == {}


def test_remedy_without_command_prints_its_text() -> None:
    remedy = Remedy.of("remove-override")
    assert remedy.command is None
    assert str(remedy) == remedy.text


def test_every_code_is_used() -> None:
    modules = [path for path in PACKAGE_ROOT.rglob("*.py") if not path.name.endswith("remedy_texts.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    assert [code for code in REMEDIES if f'"{code}"' not in source] == []


@pytest.mark.parametrize("code", REMEDIES)
def test_text_is_one_plain_line(code: str) -> None:
    text = REMEDIES[code].text
    assert text == text.strip()
    assert "\n" not in text
    assert not text.endswith(".")
