"""help"""

import argparse

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dreplica.config.schema import (
    RunConfig,
)


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


def _add_field(parser: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    default = yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True)
    default = default.removesuffix("\n").removesuffix("\n...")
    help_text = f"{field.description} (default: {default})".replace("%", "%%")
    parser.add_argument(f"--{name}", metavar="VALUE", help=help_text)
