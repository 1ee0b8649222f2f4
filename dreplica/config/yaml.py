"""Values as YAML 1.2 writes them, of a file or of one argument."""

import re
from pathlib import Path
from typing import Any

import yaml

from dreplica.errors import UsageError


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
    values = load_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else repr(values)
        raise UsageError(f"{path}: expected sections such as `train:`, found {found}.")
    return values


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

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Escapes can write what no path and no file can hold."""
        text = super().construct_scalar(node)
        if found := re.search("[\0\ud800-\udfff]", text):
            problem = f"there is a character that no text has, {found.group()!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return text

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


def load_yaml(text: str, source: str) -> Any:
    """The value that `text` writes. Raises UsageError naming `source` and the place in it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position)
        problem = f"there is a character that no text has, {chr(error.character)!r}"
        where = f" line {line + 1}, column {column}"
    except RecursionError:
        problem, where = "it is nested too deeply", ""
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    raise UsageError(f"{source}:{where and where + ':'} this cannot be read as YAML: {problem}.")
