"""Writes what the documentation takes from the code: `python docs/update.py`.

docs/configuration.md is made from the config sections. With `cases`, every case that a page of docs/causes shows is run
as well, and what it prints takes the place of what stands there.
"""

import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dreplica.commands.cases.case import read_case
from dreplica.config.base import Lockstep
from dreplica.config.schema import FaultConfig, RunConfig

DOCS = Path(__file__).parent
CONFIGURATION = DOCS / "configuration.md"
COMMAND = "python docs/update.py"
SHOWN_CASE = re.compile(r"```text\n(?P<command>\$ .*configs/cases/(?P<name>\w+)\.yaml)\n(?P<output>.*?)```", re.DOTALL)
"""A block that shows a case's command and what it prints."""

_HEAD = f"""# Every setting

Made from the code by `{COMMAND}`; `python train.py --help` prints the same.

A config file has a section per heading, a key per row; on the command line a key is `--section.key VALUE`, with VALUE
read as YAML (`null`, `true`, `[1, 2]`, `1e-3`). The command line comes after the file, and `overrides` for single
replicas after both. Keys marked * must be the same on all replicas: `overrides` cannot change them. A key that does not
exist, or a value that does not fit, ends the run with exit code 2 and one message before anything is written.
"""
_LAUNCH = """
import sys
from dreplica.distributed.launch.launcher import launch
sys.exit(launch(sys.argv[1], sys.argv[3:], int(sys.argv[2])))
"""


def configuration() -> str:
    """The text of docs/configuration.md."""
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, BaseModel)
        text = section.__doc__ if is_section else field.description
        parts.append(f"## {name}\n\n{_on_one_line(text or '')}\n")
        fields = section.model_fields if is_section else FaultConfig.model_fields if name == "inject" else {}
        if fields:
            parts.append("".join(_rows(fields)))
    return "\n".join(parts)


def _rows(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    yield "| key | value | default | |\n|---|---|---|---|\n"
    for key, field in fields.items():
        mark = "*" if any(isinstance(item, Lockstep) for item in field.metadata) else ""
        default = "needed" if field.is_required() else f"`{_as_yaml(field.get_default(call_default_factory=True))}`"
        cells = [f"`{key}`{mark}", _type_name(field.annotation), default, _on_one_line(field.description or "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in {Union, types.UnionType}:
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    return {"NoneType": "null", "str": "text", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def run_shown_case(match: re.Match[str]) -> str:
    """The block with what the case prints now, from its verdict on."""
    case = read_case(DOCS.parent / "configs" / "cases" / f"{match['name']}.yaml")
    arguments = [f"--config=configs/cases/{case.path.name}", "--run.resume=never"]
    with tempfile.TemporaryDirectory() as folder:  # in which `runs` is empty, so that folders get no suffix
        (Path(folder) / "configs").symlink_to(DOCS.parent / "configs")
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCH, case.module, str(case.num_replicas), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
            check=False,
        )
    start = done.stdout.index("VERDICT")
    lines = [line.rstrip() for line in done.stdout[start:].replace(f"{DOCS.parent}/", "").splitlines()]
    return "\n".join(["```text", match["command"], *lines, "```"])


def main() -> None:
    """Writes docs/configuration.md, and the pages' cases where asked to."""
    CONFIGURATION.write_text(configuration(), encoding="utf-8")
    if sys.argv[1:] == ["cases"]:
        for page in sorted((DOCS / "causes").glob("*.md")):
            page.write_text(SHOWN_CASE.sub(run_shown_case, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
