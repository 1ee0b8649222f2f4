"""`RunConfig`: every room's section, from a YAML file, then the command line, then `overrides` for single replicas."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dreplica.agreement.agreement import AgreementConfig
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
        merged = merge(self.model_dump(exclude={"overrides"}), partial)
        try:
            return RunConfig.model_validate(merged)
        except ValidationError as error:
            raise describe_errors(error.errors(), RunConfig, f"overrides.{replica_id}") from None

    def check_replicas(self, num_replicas: int) -> None:
        """Raises UsageError if an override or a seed names a replica that does not exist, or one lacks a seed."""
        for replica_id in self.overrides:
            if not 0 <= replica_id < num_replicas:
                raise UsageError(
                    f"overrides.{replica_id}: there is no such replica; the {num_replicas} count from 0. "
                    f"Start more with --nproc_per_node={replica_id + 1}, or override another."
                )
        check_model_seeds(self.seed, num_replicas)

    def to_yaml(self) -> str:
        """The resolved config, every key written out: what the run folder keeps."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load_config(argv: Sequence[str], num_replicas: int) -> RunConfig:
    """The config that command-line arguments ask for. Raises UsageError, naming key, value and remedy."""
    given = vars(_parser(argv).parse_args(argv))
    path = Path(given.pop("config"))
    values = read_yaml(path)
    for dotted, text in given.items():
        values = merge(values, _nest(dotted, text))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        source = str(path) if not given else f"{path} and the command line"
        raise describe_errors(error.errors(), RunConfig, source) from None
    if config.run.name is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": path.stem})})
    config.check_replicas(num_replicas)
    return config


def format_help(prog: str) -> str:
    """The help text: every field with its docstring and default."""
    return _parser([], prog).format_help()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UsageError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {str(path)!r} (from {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {str(path)!r} cannot be read: {error}.") from None
    values = _load(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected sections such as `train:`, found {type(values).__name__}.")
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
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return mapping


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
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(f"{source}:{where} this is not YAML: {problem}.") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}. See --help.")


def _parser(argv: Sequence[str], prog: str = "train.py") -> argparse.ArgumentParser:
    """All declared fields as `--section.key VALUE`; what else `argv` has of that form is taken too, for validation."""
    parser = _Parser(prog, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    parser.description = "Train replicas in lock-step and compare every bit. VALUE is read as YAML: null, true, [1, 2]."
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="a YAML file (default: configs/digits.yaml)")
    known = {"config"}
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            parser.add_argument(f"--{section}", metavar="VALUE", help=field.description)
            known.add(section)
            continue
        group = parser.add_argument_group(section, model.__doc__)
        for key, item in model.model_fields.items():
            help_text = f"{item.description} (default: {_show(item.default)})".replace("%", "%%")
            group.add_argument(f"--{section}.{key}", metavar="VALUE", help=help_text)
            known.add(f"{section}.{key}")
    for token in argv:
        name = token.removeprefix("--").split("=", 1)[0]
        if token.startswith("--") and name not in known and re.fullmatch(r"[\w.]+", name):
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
            known.add(name)
    return parser


def _show(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _nest(dotted: str, text: str) -> dict[Any, Any]:
    """`a.b` and `1e-3` as {"a": {"b": 0.001}}."""
    value = _load(text, f"--{dotted}")
    for key in reversed(dotted.split(".")):
        value = {int(key) if key.isdigit() else key: value}
    return value


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
