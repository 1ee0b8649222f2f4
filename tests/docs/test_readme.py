"""README's commands print what README says, when they are run unchanged."""

import re
import subprocess
import sys
from pathlib import Path

from dreplica.config.load import load_config
from tests.harness import REPOSITORY, environment

_TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SCREEN = 40
"""Lines of a terminal or of the top of a page."""


def blocks(kind: str) -> list[str]:
    """Return README's code blocks of a language."""
    return [text for found, text in _BLOCK.findall(_TEXT) if found == kind]


def transcript(command: str) -> tuple[str, list[str]]:
    """Return a command that README shows and the lines shown below it, without `...`."""
    (block,) = [text for text in blocks("text") if command in text.partition("\n")[0]]
    first, *shown = block.splitlines()
    return first.removeprefix("$ "), [line for line in shown if line != "..."]


def test_readme_loop_diverges_as_shown(tmp_path: Path) -> None:
    (loop,) = [text for text in blocks("python") if text.startswith("# loop.py\n")]
    (tmp_path / "loop.py").write_text(loop, encoding="utf-8")
    command, shown = transcript("loop.py")
    variables = environment() | {"PATH": f"{Path(sys.executable).parent}:{environment()['PATH']}"}
    variables.pop("PYTHONHASHSEED", None)
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 3, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in printed if line in shown] == shown, done.stdout
    assert len(shown) == 4


def test_readme_explains_the_stage_that_it_shows() -> None:
    _, shown = transcript("loop.py")
    assert f"`{shown[-1].partition(': ')[2]}`" in _TEXT


def test_first_screen_has_install_loop_and_verdict() -> None:
    screen = "\n".join(_TEXT.splitlines()[:_SCREEN])
    assert "pip install" in screen
    assert "dreplica.Agreement(model, optimizer, record=sys.argv[1])" in screen
    assert transcript("loop.py")[1][-1] in screen
    assert _TEXT.count("\n") <= 130


def test_readme_settings_of_the_trainer_are_valid() -> None:
    command, _ = transcript("dreplica train")
    config = load_config(command.partition("--replicas 2 ")[2].split(), 2)
    assert config.overrides
