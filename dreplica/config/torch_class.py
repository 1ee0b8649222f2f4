"""Construct a torch class from config keys, each checked against the class's signature."""

import inspect
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from dreplica.config.messages import config_error, invalid_value, nearest


def construct(
    section: str,
    module: ModuleType,
    name: str,
    names: list[str],
    excluded: Mapping[str, tuple[str, str]],
    arguments: Mapping[str, Any],
    *first: Any,
) -> Any:
    """Construct a class of a torch module.

    Args:
        section: Config section to name in errors.
        module: Module with the class, such as `torch.optim`.
        name: Name of the class.
        names: Names of the classes that exist.
        excluded: Problem and fix for each existing class that a config cannot build.
        arguments: Keyword arguments. A list of numbers becomes a tensor where the signature says so.
        *first: Positional arguments that come first.

    Raises:
        UsageError: The class or an argument does not exist, one is missing, or one has the wrong type.
    """
    if name in excluded and name in names:
        problem, fix = excluded[name]
        raise config_error("unusable-class", f"{section}.name", f"{name} {problem}", fix, value=name)
    if name not in names:
        hint = nearest(name, [other for other in names if other not in excluded])
        problem = f"{module.__name__} has no {name!r}"
        raise config_error("unknown-name", f"{section}.name", problem, hint, value=name)
    cls = getattr(module, name)
    parameters = inspect.signature(cls.__init__).parameters
    accepted = [
        key
        for key in list(parameters)[1 + len(first) :]
        if parameters[key].kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    ]
    for key in arguments:
        if key not in accepted:
            problem = f"{name} has no argument {key!r}"
            raise config_error("unknown-key", f"{section}.{key}", problem, nearest(key, accepted))
    missing = [key for key in accepted if key not in arguments and parameters[key].default is inspect.Parameter.empty]
    if missing:
        key = f"{section}.{missing[0]}"
        fix = f"Set it in the config or with --{key} VALUE."
        raise config_error("missing-value", key, f"{name} requires a value", fix)
    for key, value in arguments.items():
        _check_kind(f"{section}.{key}", value, parameters[key])
    values = {
        key: _as_tensor(f"{section}.{key}", value) if parameters[key].annotation in _TENSOR else value
        for key, value in arguments.items()
    }
    return cls(*first, **values)


def _check_kind(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Check the type of a value: torch looks at some only during training, and takes `foreach: "no"` for true."""
    default, declared = parameter.default, inspect.formatannotation(parameter.annotation).strip("'")
    optional = default is None or "None" in declared
    if isinstance(value, float) and not math.isfinite(value):
        fits, expected = False, "a finite number"
    elif isinstance(default, bool) or declared in {"bool | None", "Optional[bool]"}:
        fits, expected = isinstance(value, bool), "true or false"
    elif declared in {"int", "int | None", "Optional[int]"}:
        fits, expected = _is_number(value, int), "an integer"
    elif declared == "Iterable[int]":
        fits = isinstance(value, list) and all(_is_number(item, int) for item in value)
        expected = "a list of integers, such as [1, 2]"
    elif isinstance(default, int | float) or declared == "float":
        fits, expected = _is_number(value, int | float) or isinstance(value, list), "a number"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), f"text, such as {default!r}"
    elif isinstance(default, tuple):
        example = ", ".join("null" if item is None else str(item) for item in default)
        fits = isinstance(value, list | tuple) and len(value) == len(default)
        expected = f"a list of {len(default)} values, such as [{example}]"
    else:
        return
    if not fits and not (value is None and optional):
        raise invalid_value(key, value, expected)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_TENSOR = (Tensor, Tensor | None, Optional[Tensor])  # noqa: UP045 (as an older torch annotates it)


def _as_tensor(key: str, value: Any) -> Any:
    """Convert a list of numbers to float32, since YAML has no tensors. Keep null."""
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        _is_number(number, int | float) and math.isfinite(number) for number in value
    )
    if not numbers:
        raise invalid_value(key, value, "a list of finite numbers, one per class, such as [1.0, 0.5, 2.0]")
    return torch.tensor(value, dtype=torch.float32)
