"""`RunConfig`: every room's section, from a YAML file, then the command line, then `overrides` for single replicas."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dreplica.agreement.agreement import AgreementConfig
from dreplica.cases.inject import FaultConfig
from dreplica.data.datasets import DataConfig
from dreplica.errors import UsageError
from dreplica.replica.build import ModelConfig, ReplicaConfig
from dreplica.replica.components import CriterionConfig, OptimConfig, ScheduleConfig
from dreplica.replica.rng import SeedConfig, check_model_seeds
from dreplica.section import Lockstep, Section, describe_errors
from dreplica.training.step import TrainConfig
from dreplica.world.determinism import DeterminismConfig
from dreplica.world.process_group import WorldConfig
from dreplica.world.run_folder import RunFolderConfig

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


class RunConfig(Section):
    """Everything that decides a run."""

    world: WorldConfig = WorldConfig()
    run: RunFolderConfig = RunFolderConfig()
    seed: SeedConfig = SeedConfig()
    model: ModelConfig = ModelConfig()
    replica: ReplicaConfig = ReplicaConfig()
    criterion: CriterionConfig = CriterionConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    determinism: DeterminismConfig = DeterminismConfig()
    agreement: AgreementConfig = AgreementConfig()
    inject: list[FaultConfig] = Field(default_factory=list)
    """Faults to inject: a list of {replica, step, target, tensor, bits, repeat, seed}."""
    overrides: dict[int, dict[str, Any]] = Field(default_factory=dict)
    """Replica id to a partial config: a declared difference between replicas, to compare two settings in lock-step."""

    @model_validator(mode="after")
    def _check_overrides(self) -> "RunConfig":
        for replica_id, partial in self.overrides.items():
            _check_override(replica_id, partial)
            self.for_replica(replica_id)
        return self

    def for_replica(self, replica_id: int) -> "RunConfig":
        """The config as replica `replica_id` runs it: its overrides merged in. Raises UsageError if they do not fit."""
        partial = self.overrides.get(replica_id)
        if not partial:
            return self
        merged = _without_empty_sections(merge(self.model_dump(exclude={"overrides"}), partial))
        try:
            return RunConfig.model_validate(merged)
        except ValidationError as error:
            raise describe_errors(error.errors(), RunConfig, lambda _: f"overrides.{replica_id}.") from None

    def check_replicas(self, num_replicas: int) -> None:
        """Raises UsageError if an override or a seed names a replica that does not exist, or one lacks a seed."""
        for replica_id in self.overrides:
            if not 0 <= replica_id < num_replicas:
                raise UsageError(
                    f"overrides.{replica_id}: there is no such replica; the {num_replicas} count from 0. "
                    f"Start more with --nproc_per_node={replica_id + 1}, or override another."
                )
        for fault in self.inject:
            if fault.replica >= num_replicas:
                raise UsageError(
                    f"inject: there is no replica {fault.replica}; the {num_replicas} count from 0. Choose another."
                )
        check_model_seeds(self.seed, num_replicas)

    def to_yaml(self) -> str:
        """The resolved config, every key written out: what the run folder keeps."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load_config(argv: Sequence[str], num_replicas: int) -> RunConfig:
    """The config that command-line arguments ask for. Raises UsageError, naming key, value and remedy."""
    given = _split_arguments(argv)
    path = Path(given.pop("config", str(DEFAULT_CONFIG)))
    values = read_yaml(path)
    partial: dict[Any, Any] = {}
    for dotted, text in given.items():
        value = _load(text, f"--{dotted}")
        if "." in dotted:
            _set(partial, dotted, value)
        else:
            values[dotted] = value  # a whole section replaces the file's
    values = merge(values, partial)
    try:
        config = RunConfig.model_validate(_without_empty_sections(values))
    except ValidationError as error:
        raise describe_errors(error.errors(), RunConfig, lambda key: _source(key, given, path)) from None
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    config.check_replicas(num_replicas)
    return config


def format_help(prog: str) -> str:
    """The help text: every field with its docstring and default."""
    parser = argparse.ArgumentParser(prog, add_help=False, usage=f"{prog} [--config FILE] [--section.key VALUE ...]")
    parser.description = "Train replicas in lock-step and compare every bit. VALUE is read as YAML: null, true, [1, 2]."
    parser.add_argument("--config", metavar="FILE", help="a YAML file (default: configs/digits.yaml)")
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            _add_field(parser, section, field)
            continue
        group = parser.add_argument_group(section, model.__doc__)
        for key, item in model.model_fields.items():
            _add_field(group, f"{section}.{key}", item)
    return parser.format_help()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {str(path)!r} (from {Path.cwd()}). Correct the path.") from None
    except OSError as error:
        raise UsageError(f"--config: {str(path)!r} cannot be read ({error.strerror}). Name a YAML file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config: {str(path)!r} is not text. Name a YAML file.") from None
    values = _load(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else repr(values)
        raise UsageError(f"{path}: expected sections such as `train:`, found {found}.")
    return values


def merge(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `partial` laid over it, mapping by mapping. A component given another name keeps no old arguments."""
    merged = dict(base)
    for key, value in partial.items():
        old = merged.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            merged[key] = value
        elif key in {"criterion", "optim", "schedule"} and value.get("name", old.get("name")) != old.get("name"):
            merged[key] = {**({"lr": old["lr"]} if "lr" in old else {}), **value}
        else:
            merged[key] = merge(old, value)
    return merged


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-3` is a number, `off` and `no` are words; a key given twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                problem = f"the key {key_node.value!r} stands twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """PyYAML's own reads 010 as 8 and fails on 08; in YAML 1.2 both are decimal."""
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])


def _load(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position)
        problem = f"there is a character that no text has, {chr(error.character)!r}"
        where = f" line {line + 1}, column {column}"
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    raise UsageError(f"{source}:{where}: this cannot be read as YAML: {problem}.")


def _split_arguments(argv: Sequence[str]) -> dict[str, str]:
    """`--section.key VALUE` and `--section.key=VALUE` by name. Raises UsageError for anything else."""
    given: dict[str, str] = {}
    rest = iter(argv)
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
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
    """Sets `a.b` in nested mappings, made as needed."""
    *sections, last = (int(key) if key.isdecimal() else key for key in dotted.split("."))
    for key in sections:
        if not isinstance(mapping.get(key), dict):
            mapping[key] = {}
        mapping = mapping[key]
    mapping[last] = value


def _without_empty_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """A section of which the file only has the name keeps its defaults."""
    return {key: value for key, value in values.items() if value is not None or key not in RunConfig.model_fields}


def _source(key: str, given: Mapping[str, str], path: Path) -> str:
    """How a message about `key` begins, so that the user knows where to mend it."""
    on_command_line = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in given)
    return "command line: " if on_command_line else f"{path}: "


def _add_field(parser: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    default = yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True)
    default = default.removesuffix("\n").removesuffix("\n...")
    help_text = f"{field.description} (default: {default})".replace("%", "%%")
    parser.add_argument(f"--{name}", metavar="VALUE", help=help_text)


def _check_override(replica_id: int, partial: Mapping[str, Any]) -> None:
    """Raises UsageError for a key that replicas in lock-step must share."""
    for section, values in partial.items():
        model = RunConfig.model_fields[section].annotation if section in RunConfig.model_fields else None
        if section == "overrides":
            raise UsageError(f"overrides.{replica_id}.overrides: overrides do not nest.")
        if not (isinstance(model, type) and issubclass(model, BaseModel) and isinstance(values, Mapping)):
            continue
        for key in values:
            field = model.model_fields.get(key)
            if field is not None and any(isinstance(mark, Lockstep) for mark in field.metadata):
                raise UsageError(
                    f"overrides.{replica_id}.{section}.{key}: replicas in lock-step must share this value. "
                    f"Set {section}.{key} for all of them."
                )
