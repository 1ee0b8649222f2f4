"""A class of torch's, called with a config's keys: each checked against its signature."""

import inspect
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from dreplica.config.messages import nearest, show
from dreplica.errors import UsageError


def construct(
    section: str,
    module: ModuleType,
    name: str,
    names: list[str],
    excluded: Mapping[str, str],
    arguments: Mapping[str, Any],
    *first: Any,
) -> Any:
    """An instance of the class `name` of `module`, with `first` and then `arguments` by keyword.

    `names`: the classes there are; `excluded`: those of them that are not built, with the reason. An argument that is
    a tensor takes a list of numbers. Raises UsageError naming `section` and key.
    """
    if name in excluded and name in names:
        raise UsageError(f"{section}.name: {name} {excluded[name]}")
    if name not in names:
        valid = [other for other in names if other not in excluded]
        raise UsageError(f"{section}.name: {module.__name__} has no {name!r}. {nearest(name, valid)}")
    cls = getattr(module, name)
    parameters = inspect.signature(cls.__init__).parameters
    takes = [
        key
        for key in list(parameters)[1 + len(first) :]
        if parameters[key].kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    ]
    for key in arguments:
        if key not in takes:
            raise UsageError(f"{section}.{key}: {name} has no argument {key!r}. {nearest(key, takes)}")
    missing = [key for key in takes if key not in arguments and parameters[key].default is inspect.Parameter.empty]
    if missing:
        raise UsageError(
            f"{section}.{missing[0]}: {name} needs a value for it. Set it in the config or with "
            f"--{section}.{missing[0]} VALUE."
        )
    for key, value in arguments.items():
        _check_kind(f"{section}.{key}", value, parameters[key])
    values = {
        key: _as_tensor(f"{section}.{key}", value) if parameters[key].annotation in _TENSOR else value
        for key, value in arguments.items()
    }
    return cls(*first, **values)


def _check_kind(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raises UsageError for a value of another kind than `parameter`'s: torch looks at some first in mid-run, and takes
    `foreach: "no"` for true."""
    default, declared = parameter.default, inspect.formatannotation(parameter.annotation).strip("'")
    optional = default is None or "None" in declared
    if isinstance(value, float) and not math.isfinite(value):
        fits, wanted = False, "a finite number"
    elif isinstance(default, bool) or declared in {"bool | None", "Optional[bool]"}:
        fits, wanted = isinstance(value, bool), "true or false"
    elif declared in {"int", "int | None", "Optional[int]"}:
        fits, wanted = _is_number(value, int), "a whole number"
    elif declared == "Iterable[int]":
        fits = isinstance(value, list) and all(_is_number(item, int) for item in value)
        wanted = "a list of whole numbers, such as [1, 2]"
    elif isinstance(default, int | float) or declared == "float":
        fits, wanted = _is_number(value, int | float) or isinstance(value, list), "a number"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), f"a word, such as {default!r}"
    elif isinstance(default, tuple):
        example = ", ".join("null" if item is None else str(item) for item in default)
        fits = isinstance(value, list | tuple) and len(value) == len(default)
        wanted = f"a list of {len(default)}, such as [{example}]"
    else:
        return
    if not fits and not (value is None and optional):
        raise UsageError(f"{key}: {show(value)} will not do: it should be {wanted}.")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_TENSOR = (Tensor, Tensor | None, Optional[Tensor])  # noqa: UP045 (as an older torch annotates it)


def _as_tensor(key: str, value: Any) -> Any:
    """A list of numbers as float32 (YAML has no tensors); null as it is. Raises UsageError for anything else."""
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        _is_number(number, int | float) and math.isfinite(number) for number in value
    )
    if not numbers:
        raise UsageError(f"{key}: {show(value)} will not do: give a list of numbers, one per class: [1.0, 0.5, 2.0].")
    return torch.tensor(value, dtype=torch.float32)
