"""The documentation matches the code: causes, remedies, cases, settings and links."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.commands.cases.case import find_cases
from tests.harness import REPOSITORY

_DOCS = REPOSITORY / "docs"
_PAGES = {path.stem: path for path in (_DOCS / "causes").glob("*.md")}
_TEXTS = [REPOSITORY / "README.md", *sorted(_DOCS.rglob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"|srcset=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def update() -> ModuleType:
    """The module docs/update.py."""
    spec = importlib.util.spec_from_file_location("docs_update", _DOCS / "update.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _words(text: str) -> str:
    """Join lines and drop quotation marks, so that a sentence may be wrapped."""
    return " ".join(text.replace("\n> ", "\n").split())


def test_every_cause_has_a_page() -> None:
    assert set(_PAGES) == set(CAUSES) - {"none"}


@pytest.mark.parametrize("cause", sorted(_PAGES))
def test_cause_page_has_explanation_and_remedies(cause: str) -> None:
    text = _PAGES[cause].read_text()
    assert text.startswith(f"# {cause}\n\n> ")
    assert CAUSES[cause].explanation in _words(text)
    blocks = [set(block.group().splitlines()) for block in _FENCED.finditer(text)]
    remedies = [str(remedy) for remedy in CAUSES[cause].remedy]
    assert any(set(remedies) <= block for block in blocks), "put in:\n" + "\n".join(remedies)


@pytest.mark.parametrize("cause", sorted(_PAGES))
def test_cause_page_shows_its_case_and_names_all(cause: str, update: ModuleType) -> None:
    text = _PAGES[cause].read_text()
    (shown,) = update.SHOWN_CASE.finditer(text)
    expected = {case.name: case.expected["cause"] for case in find_cases()}
    assert expected[shown["name"]] == cause
    assert f"`dreplica cases {shown['name']}`" in text
    assert shown["output"].startswith(f"VERDICT {cause}: "), "python docs/update.py cases"
    assert str(REPOSITORY) not in shown["output"]
    named = set(re.findall(r"configs/cases/(\w+)\.yaml", text))
    assert named >= {name for name, other in expected.items() if other == cause}


def test_configuration_page_is_up_to_date(update: ModuleType) -> None:
    assert update.CONFIGURATION.read_text() == update.configuration(), f"out of date; run: {update.COMMAND}"
    assert update.VERDICTS.read_text() == update.verdicts(), f"out of date; run: {update.COMMAND}"


def test_verdict_page_explains_every_field() -> None:
    text = (_DOCS / "verdicts.md").read_text()
    for field in Verdict.__dataclass_fields__:
        assert f"`{field}`" in text, field
    for cause in CAUSES:
        assert f"`{cause}`" in text or f"(causes/{cause}.md)" in text, cause


@pytest.mark.parametrize("path", _TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_resolve(path: Path) -> None:
    text = _FENCED.sub("", path.read_text())
    for target in (next(filter(None, groups)) for groups in _LINK.findall(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        leads_to = (path.parent / name).resolve() if name else path
        assert leads_to.exists(), target
        if anchor:
            assert anchor in _anchors(leads_to), target


def _anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub generates from headings."""
    headings = _HEADING.findall(_FENCED.sub("", path.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_index() -> None:
    seen: set[Path] = set()
    pending = [_DOCS / "README.md"]
    while pending:
        path = pending.pop()
        seen.add(path)
        for groups in _LINK.findall(_FENCED.sub("", path.read_text())):
            target = (path.parent / next(filter(None, groups)).partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_relative_to(_DOCS) and target not in seen:
                pending.append(target)
    assert seen == set(_DOCS.rglob("*.md"))


def test_json_blocks_are_valid() -> None:
    for path in _TEXTS:
        for block in re.findall(r"^```json\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            json.loads(block)
