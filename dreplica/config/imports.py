"""imports"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from dreplica.config.messages import nearest
from dreplica.errors import UsageError


def import_function(key: str, path: str) -> Callable[..., Any]:
    """The function that `path`, as `package.module:function`, names. Raises UsageError naming `key`."""
    if not _FUNCTION.fullmatch(path):
        raise UsageError(f"{key}: {path!r} is not of the form package.module:function. Write it so.")
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise UsageError(
            f"{key}: {path!r}: there is no module {error.name!r}. Put the folder that holds it on PYTHONPATH, "
            "or correct the name."
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"{key}: {path!r}: {module_name} has no function {function_name!r}. {nearest(function_name, callables)}"
        )
    return function


def call_function(key: str, path: str, *arguments: Any, **keywords: Any) -> Any:
    """What the function that `path` names returns. Raises UsageError naming `key` if it is none or takes otherwise."""
    function = import_function(key, path)
    try:
        signature = inspect.signature(function)
    except ValueError:
        signature = None  # some written in C do not tell theirs
    if signature is not None:
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            given = [*("a value" for _ in arguments), *(f"{name}=" for name in keywords)]
            raise UsageError(f"{key}: {path!r} cannot be called with ({', '.join(given)}): {error}.") from None
    return function(*arguments, **keywords)


_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
