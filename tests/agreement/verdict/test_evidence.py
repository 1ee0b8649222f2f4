"""Evidence and its catalogue."""

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.evidence_texts import EVIDENCE
from dreplica.config.paths import PACKAGE_ROOT


def codes_in(path: Path) -> Iterator[tuple[str, int]]:
    """Yield code and line of each code of evidence that a module names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in EVIDENCE:
            yield node.value, node.lineno


def test_of_renders_text_and_keeps_data() -> None:
    evidence = Evidence.of("differing-stages", stages=["weights", "rng"])
    assert evidence.text == str(evidence) == "differing stages: weights, rng"
    assert evidence.as_dict() == {
        "code": "differing-stages",
        "text": "differing stages: weights, rng",
        "data": {"stages": ["weights", "rng"]},
    }


def test_of_keeps_lists_of_numbers() -> None:
    assert Evidence.of("replays-vary", replicas=[0, 2]).text.endswith("on replicas [0, 2]")


def test_of_renders_a_ratio_without_bound() -> None:
    evidence = Evidence.of("float64-outside", replica=1, ratio=float("inf"))
    assert "(inf of the bound)" in evidence.text
    assert evidence.data == {"replica": 1, "ratio": "inf"}


def test_of_rejects_unknown_codes_and_missing_data() -> None:
    with pytest.raises(KeyError):
        Evidence.of("no-such-code")
    with pytest.raises(KeyError):
        Evidence.of("differing-stages")


def test_every_code_is_used() -> None:
    modules = [path for path in PACKAGE_ROOT.rglob("*.py") if not path.name.endswith("evidence_texts.py")]
    used = {code for path in modules for code, _ in codes_in(path)}
    assert set(EVIDENCE) - used == set()


@pytest.mark.parametrize("code", EVIDENCE)
def test_text_is_one_plain_line(code: str) -> None:
    template = EVIDENCE[code]
    assert list(string.Formatter().parse(template))
    assert template == template.strip()
    assert "\n" not in template
    assert not template.endswith(".")
