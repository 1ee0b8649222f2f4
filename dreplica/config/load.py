"""Load a `RunConfig`: from a YAML file, then the command line, then `overrides` for single replicas."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dreplica.config.given import dotted_keys, keep_given
from dreplica.config.ignored import find_ignored
from dreplica.config.messages import (
    COMMAND_LINE,
    closest,
    config_error,
    empty_config,
    invalid_value,
    join_errors,
    locate,
)
from dreplica.config.overrides import merge
from dreplica.config.paths import CONFIGS_FOLDER, find_config, packaged_configs, packaged_name
from dreplica.config.schema import WHOLE_CONFIG, RunConfig, WorldConfig
from dreplica.config.validation import describe_errors
from dreplica.config.yaml import load_yaml, read_yaml
from dreplica.errors import UsageError

DEFAULT_CONFIG = CONFIGS_FOLDER / "digits.yaml"


def load_config(argv: Sequence[str], num_replicas: int) -> RunConfig:
    """Load the config from command-line arguments.

    Args:
        argv: `--config FILE` and `--section.key VALUE`, each also with `=`.
        num_replicas: Number of replicas, which seeds, overrides and faults must fit.

    Raises:
        UsageError: An argument, the file or a value is invalid. The message has a line for each key.
    """
    given = _split_arguments(argv)
    path = _config_path(given.pop("config", None))
    values = read_yaml(path)
    partial: dict[Any, Any] = {}
    for dotted in sorted(given, key=lambda name: name.count(".")):  # whole sections first, then their keys
        _set(partial, dotted, load_yaml(given[dotted], f"{COMMAND_LINE}: --{dotted}"))
    values = merge({key: value for key, value in values.items() if key not in given}, partial)
    try:
        config = RunConfig.model_validate(_without_empty_sections(values))
    except ValidationError as error:
        raise describe_errors(error.errors(), RunConfig, lambda key: _source(key, given, path)) from None
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    try:
        config.check_replicas(num_replicas)
    except UsageError as error:
        raise locate(error, _source(error.fields["key"], given, path)) from None
    chosen = values if _is_users_own(path) else partial
    keep_given(config, dotted_keys(chosen))
    ignored = find_ignored(config, dotted_keys(chosen))
    for replica_id, own in (chosen.get("overrides") or {}).items():
        ignored += find_ignored(config.for_replica(replica_id), dotted_keys(own or {}), f"overrides.{replica_id}.")
    if ignored:
        raise join_errors([locate(error, _source(error.fields["key"], given, path)) for error in ignored])
    return config


def world_timeout(argv: Sequence[str]) -> float:
    """Return `world.timeout` without checking the rest of the config, which may import the user's code.

    Args:
        argv: As for `load_config`.

    Returns:
        The timeout in seconds, or its default where it or the config is invalid, which `load_config` reports.
    """
    try:
        given = _split_arguments(argv)
        path = _config_path(given.get("config"))
        section = read_yaml(path).get("world") if path.is_file() else None  # a pipe can be read only once
        section = load_yaml(given["world"], "") if "world" in given else section
        own = load_yaml(given["world.timeout"], "") if "world.timeout" in given else None
        values = {} if own is None else {"timeout": own}
        return WorldConfig.model_validate((section or {}) | values).timeout
    except (UsageError, ValidationError, TypeError):
        return WorldConfig().timeout


def _is_users_own(path: Path) -> bool:
    """Return True for a file that a user wrote, rather than one that ships with dreplica or lists all settings."""
    if not path.is_file():
        return True  # a pipe, which can be read only once
    if path.resolve() in [packaged.resolve() for packaged in packaged_configs().values()]:
        return False
    return not path.read_text(encoding="utf-8").startswith(WHOLE_CONFIG)


def _config_path(name: str | None) -> Path:
    if name is None:
        return DEFAULT_CONFIG
    if not name:
        raise empty_config()
    path = find_config(name)
    if path is None:
        packaged = packaged_configs()
        match = closest(packaged_name(name), packaged)
        shown = [other for other in packaged if "/" not in other]
        hint = f"Correct the path, or use one of: {', '.join(shown)}." if match is None else f"Did you mean {match!r}?"
        problem = f"no file {name!r} in {str(Path.cwd())!r}, and no config of this name ships with dreplica"
        raise config_error("unknown-config", "--config", problem, hint, value=name, expected=list(packaged))
    return path


def _split_arguments(argv: Sequence[str]) -> dict[str, str]:
    """Return the values of `--section.key VALUE` and `--section.key=VALUE` by name."""
    given: dict[str, str] = {}
    rest = iter(argv)
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        option = f"--{name}"
        if not token.startswith("--") or "" in name.split("."):
            raise invalid_value(COMMAND_LINE, token, "--section.key VALUE", "See --help.")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                fix = f"Write {option} VALUE."
                raise config_error("missing-value", option, "a value is required", fix, source=COMMAND_LINE)
            value = following
        if name in given:
            raise _given_twice(option, given[name], value)
        given[name] = value
    return given


def _set(mapping: dict[Any, Any], dotted: str, value: Any) -> None:
    """Set `a.b` in nested mappings, which are made as needed."""
    *sections, last = (int(key) if _REPLICA_ID.fullmatch(key) else key for key in dotted.split("."))
    for key in sections:
        if mapping.get(key) is None:
            mapping[key] = {}
        if not isinstance(mapping[key], dict):
            problem = f"conflicts with {mapping[key]!r}, given for all of {key}"
            raise config_error("repeated-option", f"--{dotted}", problem, "Keep one.", source=COMMAND_LINE)
        mapping = mapping[key]
    if last in mapping:
        raise _given_twice(dotted, mapping[last], value)
    mapping[last] = value


def _given_twice(option: str, first: Any, second: Any) -> UsageError:
    problem = f"given twice, as {first!r} and {second!r}"
    return config_error("repeated-option", option, problem, "Keep one.", source=COMMAND_LINE)


_REPLICA_ID = re.compile("-?[0-9]{1,9}")


def _without_empty_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop sections without keys, which keep their defaults."""
    return {key: value for key, value in values.items() if value is not None or key not in RunConfig.model_fields}


def _source(key: str, given: Mapping[str, str], path: Path) -> str:
    """Return where the value of a key was given: on the command line or in the file."""
    on_command_line = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
    return COMMAND_LINE if on_command_line else str(path)
