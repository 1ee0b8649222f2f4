"""Cases: configs that produce one known cause each, with the expected verdict in the file's header.

The header is the comment at the top of the YAML file. Some of its lines are read by programs::

    # Expected: optimizer-not-bound step=0 suspects=[0, 1]
    # Replicas: 2
    # Module: dreplica.worker

`Expected` is required. Its fields are those of the verdict in report.json (`step`, `stage`, `operator`, …), and
`val_accuracy` (`equal` or `unequal` over the replicas, in every epoch), `weights` (`equal` or `unequal` at the end) and
`orders` (`distinct`: no two steps saw the same samples in the same order). `Module` is what torchrun starts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.messages import nearest
from dreplica.config.paths import CONFIGS_FOLDER
from dreplica.errors import UsageError

CASES_FOLDER = CONFIGS_FOLDER / "cases"

_OBSERVED = ("val_accuracy", "weights", "orders")
_FIELDS = sorted({field.name for field in fields(Verdict)} - {"agreed", "summary", "evidence", "remedy", "cause"})
_EXPECTED_FIELD = re.compile(r"(\w+)=(\[[^\]]*\]|\S+)")
_KEYS = ("Expected", "Replicas", "Module")


@dataclass(frozen=True)
class Case:
    """One config of configs/cases."""

    name: str
    """Name of the file, without `.yaml`."""
    path: Path
    expected: Mapping[str, Any]
    """The expected values by field, `cause` included."""
    num_replicas: int = 2
    module: str = "dreplica.worker"
    """The module that torchrun starts once per replica."""


def find_cases(names: Sequence[str] = (), folder: Path = CASES_FOLDER) -> list[Case]:
    """Return the cases of these names, in their order, or all cases sorted by name.

    Raises:
        UsageError: For an unknown name, or a folder without cases.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not paths:
        raise UsageError(f"there are no cases in {str(folder)!r}. Run from a checkout that has configs/cases.")
    for name in names:
        if name not in paths:
            raise UsageError(f"there is no case {name!r}. {nearest(name, paths)}")
    return [read_case(paths[name]) for name in names or paths]


def read_case(path: Path) -> Case:
    """Read a case from its file.

    Raises:
        UsageError: For an invalid header. The message names the file, the line and the fix.
    """
    given: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        key, colon, value = line.removeprefix("#").strip().partition(":")
        if not colon or key not in _KEYS:
            continue
        if key in given:
            raise UsageError(f"{path}: '# {key}:' is in the header twice. Keep one.")
        given[key] = value.strip()
    if "Expected" not in given:
        raise UsageError(f"{path}: the header has no expected cause. Add a line such as '# Expected: none'.")
    replicas = given.get("Replicas", "2")
    if not replicas.isdecimal() or int(replicas) < 1:
        raise UsageError(
            f"{path}: '# Replicas: {replicas}' expected a positive number. Write a line such as '# Replicas: 2'."
        )
    expected = _read_expected(given["Expected"], path)
    return Case(path.stem, path, expected, int(replicas), given.get("Module", Case.module))


def _read_expected(text: str, path: Path) -> dict[str, Any]:
    cause, _, rest = text.partition(" ")
    if cause not in CAUSES:
        raise UsageError(f"{path}: '# Expected: {text}': there is no cause {cause!r}. {nearest(cause, CAUSES)}")
    expected: dict[str, Any] = {"cause": cause}
    for name, value in _EXPECTED_FIELD.findall(rest):
        valid = [*_FIELDS, *_OBSERVED]
        if name not in valid:
            raise UsageError(f"{path}: '# Expected: {text}': there is no field {name!r}. {nearest(name, valid)}")
        expected[name] = yaml.safe_load(value)
    unread = _EXPECTED_FIELD.sub("", rest).strip()
    if unread:
        raise UsageError(
            f"{path}: '# Expected: {text}': {unread!r} is not of the form field=value. Write for example step=3."
        )
    return expected
