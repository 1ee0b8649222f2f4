"""The help text of the config: every field with its docstring and default."""

import argparse
from collections.abc import Sequence

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dreplica.config.messages import closest, config_error, nearest
from dreplica.config.schema import FaultConfig, RunConfig


def help_topic(argv: Sequence[str]) -> str | None:
    """Return what `--help` in a command line asks about.

    Returns:
        The section in `--help SECTION`, "" for `--help` alone, or None if there is no `--help`.
    """
    for index, token in enumerate(argv):
        name, _, value = token.partition("=")
        if name in {"-h", "--help"}:
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            return value or ("" if following.startswith("-") else following)
    return None


def format_help(prog: str | None, section: str = "") -> str:
    """Return the help text of the config.

    Args:
        prog: Name of the program, for the usage line. None for a text without usage line, which continues another.
        section: The only section to describe. All of them if empty.

    Raises:
        UsageError: There is no such section.
    """
    sections = [_known_section(section)] if section else list(RunConfig.model_fields)
    usage = argparse.SUPPRESS if prog is None else f"{prog} [--config FILE] [--section.key VALUE ...]"
    parser = argparse.ArgumentParser(prog, add_help=False, usage=usage)
    plain: argparse._ActionsContainer = parser
    if not section:
        text = "VALUE is read as YAML: null, true, [1, 2]. --help SECTION describes one section, such as --help optim."
        plain = parser.add_argument_group("settings", text)
        text = "YAML file, or the name of a config that ships with dreplica (default: configs/digits.yaml)"
        plain.add_argument("--config", metavar="FILE", help=text)
    if prog is not None and not section:
        parser.description = "Train replicas and compare every bit of their state."
    for name in sections:
        field = RunConfig.model_fields[name]
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            group = parser.add_argument_group(name, model.__doc__)
            for key, item in model.model_fields.items():
                _add_field(group, f"--{name}.{key}", item)
        else:
            _add_field(plain, f"--{name}", field)
            if section == "inject":
                faults = parser.add_argument_group("keys of each fault", FaultConfig.__doc__)
                for key, item in FaultConfig.model_fields.items():
                    _add_field(faults, key, item)
    return parser.format_help()


def _known_section(name: str) -> str:
    """Return the section that `--help NAME` means, where NAME may be a dotted key too."""
    section = name.removeprefix("--").partition(".")[0]
    if section in RunConfig.model_fields:
        return section
    if closest(section, RunConfig.model_fields) is None:
        for other, field in RunConfig.model_fields.items():
            if section in getattr(field.annotation, "model_fields", {}):
                raise config_error("unknown-name", "--help", f"no section {name!r}", f"Did you mean {other!r}?")
    raise config_error("unknown-name", "--help", f"no section {name!r}", nearest(section, RunConfig.model_fields))


def _add_field(parser: argparse._ActionsContainer, option: str, field: FieldInfo) -> None:
    """Add a field as an option, or as a plain key if `option` does not begin with dashes."""
    if field.is_required():
        default = "required"
    else:
        value = yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True)
        default = "default: " + value.removesuffix("\n").removesuffix("\n...")
    metavar = "VALUE" if option.startswith("--") else None
    parser.add_argument(option, metavar=metavar, help=f"{field.description} ({default})".replace("%", "%%"))
