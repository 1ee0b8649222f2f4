"""The tree follows the style guide: docstrings, names and words, counted by `tests/style.py`."""

from pathlib import Path

import pytest

from tests.harness import REPOSITORY
from tests.style import Counts, count, imperative_share


@pytest.fixture(scope="module")
def counts() -> Counts:
    folders = [REPOSITORY / name for name in ("dreplica", "tests", "docs", "configs", "launch")]
    return count([*folders, *sorted(REPOSITORY.glob("*.md"))])


@pytest.mark.process
def test_docstrings_are_imperative_sentences(counts: Counts) -> None:
    assert imperative_share(counts, public=True) >= 0.98
    assert counts.numbers["function docstrings that are fragments"] == 0


@pytest.mark.process
def test_parameters_are_described(counts: Counts) -> None:
    assert counts.numbers["public functions of 3 or more parameters without Args"] == 0
    assert counts.numbers["D417: arguments not described"] == 0


@pytest.mark.process
def test_quaint_phrases_are_rare(counts: Counts) -> None:
    assert counts.numbers["phrases in all"] <= 20, "\n".join(place for place in counts.places if "phrase" in place)


@pytest.mark.process
def test_test_names_are_short(counts: Counts) -> None:
    assert counts.numbers["test names over 60 characters"] == 0


@pytest.mark.process
def test_counts_see_what_is_wrong(tmp_path: Path) -> None:
    package = tmp_path / "dreplica"
    package.mkdir()
    (package / "module.py").write_text(
        'def f(a, b, c):\n    """What it comes to; for nobody."""\n\n\ndef g(a):\n    """Return one."""\n'
    )
    counts = count([package])
    assert counts.numbers["function docstrings that are fragments"] == 1
    assert counts.numbers["public functions of 3 or more parameters without Args"] == 1
    assert counts.numbers["first lines with a semicolon"] == 1
    assert (counts.numbers["phrase: comes to"], counts.numbers["phrase: whoever"]) == (1, 1)
    assert imperative_share(counts) == 0.5
