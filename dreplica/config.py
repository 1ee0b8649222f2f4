"""`RunConfig`: every room's section, from a YAML file, then the command line, then `overrides` for single replicas."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from dreplica.agreement.config import AgreementConfig
from dreplica.cases.inject import FaultConfig
from dreplica.data.config import DataConfig
from dreplica.errors import UsageError
from dreplica.paths import CONFIGS_FOLDER
from dreplica.replica.build import ModelConfig, ReplicaConfig
from dreplica.replica.components import CriterionConfig, OptimConfig, ScheduleConfig
from dreplica.replica.rng import SeedConfig, check_model_seeds
from dreplica.report.sinks import ReportConfig
from dreplica.section import Lockstep, Section, describe_errors
from dreplica.training.checkpoint import CheckpointConfig
from dreplica.training.step import TrainConfig
from dreplica.world.determinism import DeterminismConfig
from dreplica.world.process_group import WorldConfig
from dreplica.world.run_folder import RunFolderConfig
from dreplica.yaml_values import load_yaml, read_yaml

DEFAULT_CONFIG = CONFIGS_FOLDER / "digits.yaml"


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
    checkpoint: CheckpointConfig = CheckpointConfig()
    agreement: AgreementConfig = AgreementConfig()
    report: ReportConfig = ReportConfig()
    inject: list[FaultConfig] = Field(default_factory=list)
    """Faults to inject: a list of {replica, step, target, tensor, bits, repeat, seed}."""
    overrides: dict[int, dict[str, Any]] = Field(default_factory=dict)
    """Replica id to a partial config: a declared difference between replicas, to compare two settings in lock-step."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _drop_empty(cls, overrides: Any) -> Any:
        """A replica or section of which there is only the name overrides nothing, and declares no difference."""
        if not isinstance(overrides, Mapping):
            return overrides
        sections = RunConfig.model_fields.keys() - {"overrides"}
        kept = {
            replica_id: {key: value for key, value in partial.items() if key not in sections or value not in (None, {})}
            if isinstance(partial, Mapping)
            else partial
            for replica_id, partial in overrides.items()
        }
        return {replica_id: partial for replica_id, partial in kept.items() if partial not in (None, {})}

    @model_validator(mode="after")
    def _check_overrides(self) -> "RunConfig":
        for replica_id, partial in self.overrides.items():
            if "overrides" in partial:
                raise UsageError(f"overrides.{replica_id}.overrides: overrides do not nest.")
            if "inject" in partial:
                raise UsageError(
                    f"overrides.{replica_id}.inject: a fault says by itself which replica it strikes. Give it under "
                    f"inject, with replica: {replica_id}."
                )
            _check_difference(f"overrides.{replica_id}", self, self.for_replica(replica_id))
        return self

    def for_replica(self, replica_id: int) -> "RunConfig":
        """The config as replica `replica_id` runs it: its overrides merged in. Raises UsageError if they do not fit."""
        partial = self.overrides.get(replica_id)
        if not partial:
            return self
        try:
            return RunConfig.model_validate(merge(self.model_dump(exclude={"overrides"}), partial))
        except ValidationError as error:
            raise describe_errors(error.errors(), RunConfig, lambda _: f"overrides.{replica_id}.") from None

    def declared_differences(self) -> dict[int, dict[str, Any]]:
        """Replica id, section and key of what an override changes: one that says what all do declares no difference."""
        base = self.model_dump(exclude={"overrides"})
        changes = {}
        for replica_id in self.overrides:
            own = self.for_replica(replica_id).model_dump(exclude={"overrides"})
            sections = {name: values for name, values in own.items() if values != base[name]}
            changes[replica_id] = {
                name: {key: value for key, value in values.items() if key not in base[name] or value != base[name][key]}
                for name, values in sections.items()
            }
        return {replica_id: partial for replica_id, partial in changes.items() if partial}

    def check_replicas(self, num_replicas: int) -> None:
        """Raises UsageError if an override or a seed names a replica that does not exist, or one lacks a seed."""
        for replica_id in self.overrides:
            if not 0 <= replica_id < num_replicas:
                remedy = "Override another."
                if replica_id > 0:
                    remedy = f"Start more with --nproc_per_node={replica_id + 1}, or override another."
                raise UsageError(
                    f"overrides.{replica_id}: there is no such replica; the {num_replicas} count from 0. {remedy}"
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


def _add_field(parser: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    default = yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True)
    default = default.removesuffix("\n").removesuffix("\n...")
    help_text = f"{field.description} (default: {default})".replace("%", "%%")
    parser.add_argument(f"--{name}", metavar="VALUE", help=help_text)


def _check_difference(key: str, base: RunConfig, own: RunConfig) -> None:
    """Raises UsageError for a difference that replicas in lock-step cannot have, or that changes nothing."""
    for section, field in RunConfig.model_fields.items():
        for name, item in getattr(field.annotation, "model_fields", {}).items():
            value = getattr(getattr(own, section), name)
            if any(isinstance(mark, Lockstep) for mark in item.metadata) and value != getattr(
                getattr(base, section), name
            ):
                raise UsageError(
                    f"{key}.{section}.{name}: {value!r} will not do: replicas in lock-step must share this value. "
                    f"Set {section}.{name} for all of them."
                )
    if own.model.name != base.model.name and own.model.factory is not None:
        raise UsageError(
            f"{key}.model.name: {own.model.name!r} changes nothing, since model.factory ({own.model.factory!r}) comes "
            f"before it. Set {key}.model.factory to null, too, or to another."
        )
