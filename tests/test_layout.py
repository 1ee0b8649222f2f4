"""Tests mirror the package, and CONTRIBUTING lists the exceptions."""

import re
from pathlib import Path

from dreplica.config.paths import PACKAGE_ROOT
from tests.harness import REPOSITORY

_ROW = re.compile(r"^\| `(?P<module>[\w/]+\.py)` \| `(?P<test>tests/[\w/]+\.py)` \|$", re.MULTILINE)


def listed_exceptions() -> dict[str, str]:
    """Return the modules that CONTRIBUTING lists as tested elsewhere, with their test file."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {row["module"]: row["test"] for row in _ROW.finditer(text.partition("## Modules tested elsewhere")[2])}


def modules_without_test_file() -> set[str]:
    """Return the modules, relative to the package, without a test file of their name."""
    missing = set()
    for path in PACKAGE_ROOT.rglob("*.py"):
        relative = path.relative_to(PACKAGE_ROOT)
        mirrored = REPOSITORY / "tests" / relative.parent / f"test_{relative.stem}.py"
        if relative.stem not in {"__init__", "__main__"} and not mirrored.exists():
            missing.add(relative.as_posix())
    return missing


def test_every_module_has_a_test_file_or_is_listed() -> None:
    assert modules_without_test_file() == listed_exceptions().keys()


def test_listed_test_files_exist() -> None:
    assert [test for test in listed_exceptions().values() if not Path(REPOSITORY, test).exists()] == []
