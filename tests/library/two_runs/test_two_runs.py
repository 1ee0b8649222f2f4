"""Two runs of a script with one mistake: `compare` names the place, and `explain` the fix."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dreplica.commands.explain import stage_sections
from dreplica.commands.main import main
from dreplica.config.paths import STAGES_PAGE
from tests.library.two_runs.mistakes import MISTAKES, Mistake
from tests.library.two_runs.runs import SCRIPTS, Interpreter

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("two_runs")]  # one worker starts the interpreters once

SECTIONS = stage_sections(STAGES_PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def interpreters() -> Iterator[tuple[Interpreter, Interpreter]]:
    """The interpreters of the two runs."""
    both = Interpreter(1), Interpreter(2)
    yield both
    for each in both:
        each.close()


def compare(one: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Return the exit code of `dreplica compare --json`, and what it prints."""
    capsys.readouterr()
    code = main(["compare", "--json", str(one), str(other)])
    return code, json.loads(capsys.readouterr().out)


def check_place(mistake: Mistake, first: dict[str, Any]) -> None:
    """Check the place of a difference, as `compare` and a verdict have it."""
    assert first["step"] in mistake.steps, first
    assert first["stage"] in mistake.expected, first
    assert first["phase"] == mistake.phase
    tensor = mistake.expected[first["stage"]]
    assert first["tensor"] is None if tensor is None else re.fullmatch(tensor, first["tensor"]), first


@pytest.mark.parametrize("name", MISTAKES)
def test_compare_names_the_place(
    name: str, interpreters: tuple[Interpreter, Interpreter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = MISTAKES[name]
    mistake.before(tmp_path)
    interpreters[0].run(name, tmp_path, "runs/a", mistake.libraries[0])
    mistake.between(tmp_path)
    interpreters[1].run(name, tmp_path, "runs/b", mistake.libraries[1])
    code, found = compare(tmp_path / "runs" / "a", tmp_path / "runs" / "b", capsys)
    assert (code, found["outcome"]) == (3, "differ"), found
    check_place(mistake, found["first_difference"])
    if name == "library_version":
        versions = [(row["one"], row["other"]) for row in found["manifest"] if "tiny" in row["field"]]
        assert versions == [("1.0", "1.1")], found["manifest"]
        assert "tiny" in found["summary"]


@pytest.mark.parametrize("name", MISTAKES)
def test_reference_stops_at_the_place(name: str, interpreters: tuple[Interpreter, Interpreter], tmp_path: Path) -> None:
    """A run that is compared while it trains stops where `compare` finds the first difference."""
    mistake = MISTAKES[name]
    mistake.before(tmp_path)
    interpreters[0].run(name, tmp_path, "runs/a", mistake.libraries[0])
    mistake.between(tmp_path)
    verdict = interpreters[1].run(name, tmp_path, "runs/b", mistake.libraries[1], reference="runs/a")
    assert verdict is not None
    check_place(mistake, verdict)


@pytest.mark.parametrize("name", MISTAKES)
def test_explain_has_the_fix(name: str) -> None:
    mistake = MISTAKES[name]
    for stage in mistake.expected:
        assert mistake.fix in SECTIONS[stage], stage
    if set(mistake.steps) == {0}:
        assert mistake.fix in SECTIONS["build"]


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.equal_in_empty_folder])
def test_leftover_is_confirmed_in_empty_folders(
    name: str, interpreters: tuple[Interpreter, Interpreter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = tmp_path / "one", tmp_path / "other"
    for interpreter, folder in zip(interpreters, folders, strict=True):
        folder.mkdir()
        interpreter.run(name, folder, "run")
    code, found = compare(folders[0] / "run", folders[1] / "run", capsys)
    assert (code, found["outcome"]) == (0, "identical"), found


@pytest.mark.parametrize("name", ["hash_order", "hash_features", "weight_decay_sets", "parameter_order"])
def test_hash_order_is_confirmed_by_one_hash_seed(
    name: str, interpreters: tuple[Interpreter, Interpreter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("a", "b"):
        interpreters[0].run(name, tmp_path, output)
    code, found = compare(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, found["outcome"]) == (0, "identical"), found


def test_clean_script_is_identical(
    interpreters: tuple[Interpreter, Interpreter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for interpreter, output in zip(interpreters, ("a", "b"), strict=True):
        interpreter.run("clean", tmp_path, output)
    code, found = compare(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, found["outcome"]) == (0, "identical"), found
    assert found["steps_same"] == 8


def test_every_script_is_in_the_table() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*MISTAKES, "clean"}
