"""The base of every config section, and the messages a user sees when a value does not fit."""

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import ErrorDetails

from dreplica.errors import UsageError


class Section(BaseModel):
    """A config section: strict keys, strict types, immutable; the docstring beneath a field is its help."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class Lockstep:
    """Marks a field that replicas must share (`Annotated[int, Lockstep()]`): `overrides` cannot change it."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint on what `word` may have been meant to be: the nearest of `valid`, or all of them when few."""
    names = sorted(valid)
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.lower(), name)
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {folded[close[0]]!r}?"
    if len(names) > 20:
        return f"Valid are for instance: {', '.join(names[:20])}, …"
    return f"Valid are: {', '.join(names)}."


def import_function(key: str, path: str) -> Callable[..., Any]:
    """The function that `path`, as `package.module:function`, names. Raises UsageError naming `key`."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{key}: {path!r} is not of the form package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise UsageError(
            f"{key}: {path!r}: there is no module {error.name!r}. Start from the folder that holds it, or "
            "put that folder on PYTHONPATH."
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"{key}: {path!r}: {module_name} has no function {function_name!r}. {nearest(function_name, callables)}"
        )
    return function


def describe_error(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one pydantic error: key, value, what is wrong, and the nearest valid key if it is unknown."""
    location = [part for part in error["loc"] if not _is_union_branch(part)]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        parent = _model_at(root, location[:-1])
        return f"{key}: unknown key. {nearest(str(location[-1]), parent.model_fields)}"
    if error["type"] == "value_error":
        cause = error.get("ctx", {}).get("error")
        return str(cause) if isinstance(cause, UsageError) else f"{key}: {cause}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {error['input']!r} will not do: {message}."


def describe_errors(errors: Iterable[ErrorDetails], root: type[BaseModel], source: str) -> UsageError:
    """All of a ValidationError in one `UsageError`, a line per key; a key tried as several types gets one line."""
    by_key: dict[str, str] = {}
    for error in errors:
        line = describe_error(error, root)
        key = line.split(":", 1)[0]
        by_key[key] = f"{by_key[key]} Or: {line.split('will not do: ', 1)[-1]}" if key in by_key else line
    return UsageError(f"{source}: " + "\n  ".join(by_key.values()))


def _is_union_branch(part: int | str) -> bool:
    """Pydantic puts the tried branch of a union into the location (`int`, `list[int]`, `literal[...]`)."""
    return isinstance(part, str) and (part in {"int", "str", "float", "bool"} or "[" in part)


def _model_at(root: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel]:
    model = root
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return model
