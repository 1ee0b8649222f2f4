"""Reading YAML 1.2, from a file or from one command-line argument."""

import re
from pathlib import Path
from typing import Any

import yaml

from dreplica.config.messages import config_error, invalid_value
from dreplica.errors import UsageError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UsageError: The file cannot be read, or contains something other than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"{str(path)!r} cannot be read ({error.strerror})"
        raise config_error("unreadable-file", "--config", problem, "Name a YAML file.", value=str(path)) from None
    except UnicodeDecodeError:
        raise config_error(
            "unreadable-file", "--config", f"{str(path)!r} is not text", "Name a YAML file.", value=str(path)
        ) from None
    values = load_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise invalid_value(str(path), values, "sections such as `train:`")
    return values


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2: `1e-3` is a number, `off` and `no` are text. Duplicate keys are errors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                problem = f"duplicate key {key_node.value!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Reject escaped characters that no path and no file can contain."""
        text = super().construct_scalar(node)
        if found := re.search("[\0\ud800-\udfff]", text):
            problem = f"invalid character {found.group()!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return text

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer: PyYAML reads 010 as 8 and fails on 08, but YAML 1.2 reads both as decimal."""
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


def load_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        UsageError: The text is not valid YAML. The message begins with `source` and the position.
    """
    line = column = None
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position) - 1
        problem = f"invalid character {chr(error.character)!r}"
    except RecursionError:
        problem = "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            line, column = mark.line, mark.column
    problem = problem.replace("'<stream end>'", "end of file")
    position = "" if line is None or column is None else f" line {line + 1}, column {column + 1}:"
    raise UsageError(
        f"{source}:{position} invalid YAML: {problem}.", code="invalid-yaml", source=source, problem=problem
    )
