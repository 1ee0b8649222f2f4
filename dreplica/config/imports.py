"""Import and call functions that the config names as `package.module:function`."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from dreplica.config.messages import config_error, invalid_value, nearest


def import_function(key: str, path: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        key: Config key to name in errors.
        path: The function as `package.module:function`.

    Raises:
        UsageError: The path is malformed, or the module or the function does not exist.
    """
    if not _FUNCTION.fullmatch(path):
        raise invalid_value(key, path, "package.module:function")
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise config_error(
            "unknown-module",
            key,
            f"no module named {error.name!r} for {path!r}",
            "Correct the name, or put the folder that contains the module on PYTHONPATH.",
            value=path,
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value)]
        problem = f"module {module_name} has no function {function_name!r}"
        raise config_error("unknown-name", key, problem, nearest(function_name, callables), value=path)
    return function


def call_function(key: str, path: str, *arguments: Any, **keywords: Any) -> Any:
    """Import a function, call it and return its result.

    Args:
        key: Config key to name in errors.
        path: The function as `package.module:function`.
        *arguments: Positional arguments of the call.
        **keywords: Keyword arguments of the call.

    Raises:
        UsageError: The function does not exist or does not accept the arguments.
    """
    function = import_function(key, path)
    try:
        signature = inspect.signature(function)
    except ValueError:
        signature = None  # some functions written in C have none
    if signature is not None:
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            given = ", ".join([*("a value" for _ in arguments), *(f"{name}=" for name in keywords)])
            problem = f"{path!r} cannot be called with ({given}): {error}"
            raise config_error("wrong-signature", key, problem, value=path) from None
    return function(*arguments, **keywords)


_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
