"""Read what a run folder holds in addition to the trace, and compare config and manifest of two runs."""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.trace.run_report import ReportError, RunReport
from dreplica.environment.distributions import runs_kernels
from dreplica.environment.variables import HARMLESS

_CHANGES_NOTHING = {"run", "checkpoint", "agreement", "world.timeout", "train.epochs", "train.max_steps"}
"""Config sections and keys that no digest depends on: names, what is compared and saved, and the length of the run."""
_NAMES_A_MACHINE = {"host", "device.index", "device.uuid", "device.shared"}
"""Manifest fields that identify one of several equal machines or devices."""
_STARTS_THE_SCRIPT = {"argv", "script"}
"""Manifest fields that are left out for runs with a config, which has all that they determine."""
NO_CONFIG = "there is no config.yaml"
"""Problem of a run folder without a config, as those of custom training loops are."""
_CHANGES_UNKNOWN = ", changes unknown"
_OF_HASH = 12
"""Number of digits of a commit's hash that are shown and compared."""
_EACH_VERSION_HAS_OTHERS = ("cpu.", "numerics.", "packages.", "variables.")
"""Sections in which a field that only one of two manifests has may be one that the other's dreplica did not record."""


@dataclass(frozen=True)
class RunDifference:
    """A config key or manifest field in which two runs differ."""

    field: str
    """The dotted name of the key or field."""
    one: Any
    """The value in the first run, or None."""
    other: Any
    """The value in the second run, or None."""
    matters: bool
    """True if a digest can depend on it."""

    def __str__(self) -> str:
        return f"{self.field}: {show(self.one)} and {show(self.other)}"


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder in addition to the trace."""

    config: Mapping[str, Any] | None
    """Resolved config, or None if it is missing or not valid."""
    manifests: Sequence[Mapping[str, Any]] | None
    """Manifest of each replica, or None if it is missing or not valid. Of the script's arguments, one that names the
    run folder is replaced: it differs between any two runs."""
    report: RunReport | None
    """Report of the run, or None if it is missing or not valid. A run that was killed has none."""
    problems: tuple[str, ...] = ()
    """Descriptions of the files that are missing or not valid. A missing report is not a problem."""

    @property
    def is_of_custom_loop(self) -> bool:
        """True if the run was recorded by a custom training loop, which has no config."""
        return self.manifests is not None and NO_CONFIG in self.problems

    @property
    def final(self) -> Mapping[tuple[int, str], str]:
        """Digests of each replica's final state by replica and stage, 32 hexadecimal digits each."""
        rows = [] if self.report is None else self.report.fingerprints
        return {(row.replica, stage): digest for row in rows for stage, digest in row.digests.items()}

    @property
    def last_step(self) -> int | None:
        """Step to which `final` belongs. The run may have resumed since."""
        return None if self.report is None else self.report.run.last_step


def read_run(folder: Path) -> RecordedRun:
    """Read the files of a run folder, of which any may be missing or not valid."""
    problems: list[str] = []

    def read(name: str, parse: Any, is_valid: Callable[[Any], bool]) -> Any:
        try:
            content = parse((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            problems.append(f"there is no {name}")
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"{name} cannot be read: {error}")
        else:
            if is_valid(content):
                return content
            problems.append(f"{name} is not the file of a run")
        return None

    config = read("config.yaml", yaml.safe_load, lambda content: isinstance(content, dict))
    manifests = read("manifest.json", json.loads, _is_rows)
    report: RunReport | None = None
    try:
        report = RunReport.read(folder)
    except ReportError as error:
        if error.code != "no-report":
            problems.append(str(error))
    if manifests is not None:
        names = [str(folder)] if report is None else [str(folder), report.run.folder]
        manifests = [{**row, **arguments_without(names, row)} for row in manifests]
    return RecordedRun(config, manifests, report, tuple(problems))


def arguments_without(names: Sequence[str | None], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `argv` of a manifest without the arguments that name a run folder, or its parent.

    `--out=runs/a` and `--out runs/a` are both left out, and `runs/a` also if the run was recorded into `runs/a/trace`.

    Args:
        names: Paths of the run folders, or None.
        manifest: The manifest of a rank.
    """
    argv = manifest.get("argv")
    if not isinstance(argv, list):
        return {}
    folders = [os.path.normpath(name) for name in names if name]

    def names_run(argument: Any) -> bool:
        value = argument.rpartition("=")[2] if isinstance(argument, str) else ""
        path = os.path.normpath(value)
        return bool(value) and path != os.curdir and any(f"{each}/".startswith(f"{path}/") for each in folders)

    kept: list[Any] = []
    for argument in argv[1:]:
        if not names_run(argument):
            kept.append(argument)
        elif kept and not str(argument).startswith("-") and str(kept[-1]).startswith("--") and "=" not in kept[-1]:
            kept.pop()  # the option whose value it is
    return {"argv": [*argv[:1], *kept]}


def _is_rows(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(row, dict) for row in content)


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[RunDifference]:
    """Return the keys in which two resolved configs differ, in the order of the first config."""
    here, there = dict(_leaves(one)), dict(_leaves(other))
    return [
        RunDifference(key, here.get(key), there.get(key), matters=not _is_one_of(key, _CHANGES_NOTHING))
        for key in [*here, *(key for key in there if key not in here)]
        if here.get(key) != there.get(key)
    ]


def manifest_differences(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], configured: bool = False
) -> list[RunDifference]:
    """Return the fields in which the manifests of two runs differ.

    A field's value is the one that all replicas of a run have, or a list if they have different ones. The number of
    replicas makes no difference. Fields that one of the runs did not record are left out.

    Args:
        one: The manifests of the first run's replicas.
        other: The manifests of the second run's replicas.
        configured: True if both runs have a config, so that script and arguments are not compared.
    """
    here, there = _values(one), _values(other)
    sections = [{field.partition(".")[0] for field in values} for values in (here, there)]
    recorded = sections[0] & sections[1] - (_STARTS_THE_SCRIPT if configured else set())
    both_list_variables = "distributions" in recorded
    found = []
    for field in dict.fromkeys([*here, *there]):
        if field.partition(".")[0] not in recorded or here.get(field) == there.get(field):
            continue
        if _may_be_same_commit(field, here.get(field), there.get(field)):
            continue
        lists_all = both_list_variables and field.startswith("variables.")
        in_both = field in here and field in there
        if in_both or lists_all or not field.startswith(_EACH_VERSION_HAS_OTHERS):
            found.append(_difference(field, here.get(field), there.get(field)))
    named = {item.field.removeprefix("packages.") for item in found if item.field.startswith("packages.")}
    return [item for item in found if item.field.removeprefix("distributions.") not in named]


def fold_distributions(items: Sequence[RunDifference], most: int = 10) -> list[RunDifference]:
    """Return differences for a reader, in which one item counts the distributions beyond `most`.

    Args:
        items: The differences between two manifests.
        most: Number of distributions that are named. Those with kernels that torch may run come first.
    """
    rows = [item for item in items if item.field.startswith("distributions.")]
    tail = sorted(rows, key=lambda item: not runs_kernels(item.field))[most:]
    if len(tail) < 2:
        return list(items)
    count = RunDifference("distributions", *2 * (f"{len(tail)} more that differ",), matters=True)
    return [*(item for item in items if item not in tail), count]


def _difference(field: str, one: Any, other: Any) -> RunDifference:
    matters = field not in _NAMES_A_MACHINE and field.removeprefix("variables.") not in HARMLESS
    if field == "commit":
        matters = one is not None and other is not None
    if field == "argv" and isinstance(one, list) and isinstance(other, list):
        is_moved = one[1:] == other[1:] and _file_name(one) == _file_name(other)
        return RunDifference(field, *_differing_arguments(one, other), matters=matters and not is_moved)
    return RunDifference(field, one, other, matters)


def _may_be_same_commit(field: str, one: Any, other: Any) -> bool:
    """Return True if two commits have one hash, and git did not list the changes to one of them in time."""
    if field != "commit" or not isinstance(one, str) or not isinstance(other, str):
        return False
    return one[:_OF_HASH] == other[:_OF_HASH] and (one + other).count(_CHANGES_UNKNOWN) > 0


def _differing_arguments(one: Sequence[Any], other: Sequence[Any]) -> tuple[str, str]:
    """Return the arguments of each side without those that both begin or end with, as a shell has them."""
    one, other = [str(item) for item in one], [str(item) for item in other]
    shorter = min(len(one), len(other))
    start = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    rest = shorter - start
    end = next((i for i in range(rest) if one[-1 - i] != other[-1 - i]), rest)
    if start and one[start - 1].startswith("-"):
        start -= 1  # the name of the option whose value differs
    return shlex.join(one[start : len(one) - end]), shlex.join(other[start : len(other) - end])


def _file_name(argv: Sequence[Any]) -> str:
    return Path(str(argv[0])).name if argv else ""


def show(value: Any) -> str:
    """Return a value as the user would write it, shortened to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _values(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [dict(_leaves({**manifest, **_commit_text(manifest)})) for manifest in manifests]
    values: dict[str, Any] = {}
    for field in dict.fromkeys(field for row in rows for field in row if field != "replica"):
        column = [row.get(field) for row in rows]
        values[field] = column[0] if all(value == column[0] for value in column) else column
    return values


def _commit_text(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the field `commit` as one text: the start of the hash, and that of the changes to tracked files."""
    commit = manifest.get("commit")
    if not isinstance(commit, Mapping):
        return {}
    changes = _CHANGES_UNKNOWN
    if commit.get("dirty") is not None:
        changes = f", with changes {str(commit.get('diff') or '(not read)')[:12]}" if commit["dirty"] else ""
    return {"commit": f"{str(commit.get('sha'))[:_OF_HASH]}{changes}"}


def _leaves(value: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _is_one_of(key: str, names: set[str]) -> bool:
    """Return True if the dotted key, or its section, is among `names`."""
    return key in names or key.partition(".")[0] in names
