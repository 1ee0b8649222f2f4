"""`RunConfig`: every room's section, from a YAML file, then the command line, then `overrides` for single replicas."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dreplica.config.messages import describe_errors
from dreplica.config.paths import CONFIGS_FOLDER
from dreplica.config.schema import RunConfig, merge
from dreplica.config.yaml import load_yaml, read_yaml
from dreplica.errors import UsageError

DEFAULT_CONFIG = CONFIGS_FOLDER / "digits.yaml"


def load_config(argv: Sequence[str], num_replicas: int) -> RunConfig:
    """The config that command-line arguments ask for. Raises UsageError, naming key, value and remedy."""
    given = _split_arguments(argv)
    path = Path(given.pop("config", str(DEFAULT_CONFIG)))
    values = read_yaml(path)
    partial: dict[Any, Any] = {}
    for dotted in sorted(given, key=lambda name: name.count(".")):  # single keys are laid over whole sections
        _set(partial, dotted, load_yaml(given[dotted], f"--{dotted}"))
    values = merge({key: value for key, value in values.items() if key not in given}, partial)
    try:
        config = RunConfig.model_validate(_without_empty_sections(values))
    except ValidationError as error:
        raise describe_errors(error.errors(), RunConfig, lambda key: _source(key, given, path)) from None
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    config.check_replicas(num_replicas)
    return config


def _split_arguments(argv: Sequence[str]) -> dict[str, str]:
    """`--section.key VALUE` and `--section.key=VALUE` by name. Raises UsageError for anything else."""
    given: dict[str, str] = {}
    rest = iter(argv)
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or "" in name.split("."):
            raise UsageError(f"command line: {token!r} belongs to no option. Write --section.key VALUE. See --help.")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UsageError(f"command line: --{name} has no value. Write --{name} VALUE. See --help.")
            value = following
        if name in given:
            raise UsageError(f"command line: --{name} stands twice, with {given[name]!r} and {value!r}. Keep one.")
        given[name] = value
    return given


def _set(mapping: dict[Any, Any], dotted: str, value: Any) -> None:
    """Sets `a.b` in nested mappings, made as needed. Raises UsageError where there is a value already."""
    *sections, last = (int(key) if _REPLICA_ID.fullmatch(key) else key for key in dotted.split("."))
    for key in sections:
        if mapping.get(key) is None:
            mapping[key] = {}
        if not isinstance(mapping[key], dict):
            raise UsageError(
                f"command line: --{dotted} does not go with {mapping[key]!r}, given for all of {key}. Keep one."
            )
        mapping = mapping[key]
    if last in mapping:
        raise UsageError(f"command line: {dotted} stands twice, with {mapping[last]!r} and {value!r}. Keep one.")
    mapping[last] = value


_REPLICA_ID = re.compile("-?[0-9]{1,9}")


def _without_empty_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """A section of which the file only has the name keeps its defaults."""
    return {key: value for key, value in values.items() if value is not None or key not in RunConfig.model_fields}


def _source(key: str, given: Mapping[str, str], path: Path) -> str:
    """How a message about `key` begins, so that the user knows where to mend it."""
    on_command_line = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
    return "command line: " if on_command_line else f"{path}: "
