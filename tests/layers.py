"""The layer of a test, from what it calls: `unit`, `process` or `job`.

A test starts processes or jobs through functions of the harness or of the standard library. `layer_of` follows the
names that a test, its fixtures and its helpers use, so no test needs to be marked by hand. A `unit` test that
nevertheless starts a process fails (see `conftest.py`).
"""

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

STARTS_JOB = frozenset(
    {
        ("tests.harness", "run_job"),
        ("tests.harness", "torchrun"),
        ("tests.harness", "run_workers"),
        ("tests.harness", "start_workers"),
        ("tests.harness", "torchrun_command"),
        ("dreplica.distributed.launch.launcher", "launch"),
        ("dreplica.distributed.launch.background", "run_in_background"),
        ("dreplica.commands.cases.runner", "run_cases"),
        ("dreplica.commands.certify_resume", "certify_resume"),
        ("dreplica.commands.doctor.examine", "run_doctor"),
        ("dreplica.commands.flags.command", "find_flags"),
    }
)
"""Functions that start jobs of several replicas, by module and name."""

STARTS_PROCESS = frozenset({("tests.harness", "run_replicas"), ("tests.harness", "run_scripts")})
PROCESS_MODULES = frozenset({"subprocess", "multiprocessing"})
PROCESS_NAMES = frozenset({"fork", "Popen", "posix_spawn"})
PROCESS_EVENTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
"""Audit events of the interpreter that mean that a process was started."""


def layer_of(functions: list[Callable[..., Any]]) -> str:
    """Return the layer of a test.

    Args:
        functions: The test function and the functions of its fixtures.

    Returns:
        `unit`, `process` or `job`: the heaviest that any function reachable from `functions` belongs to.
    """
    layer = "unit"
    seen: set[int] = set()
    pending = [_plain(function) for function in functions]
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        key = (function.__module__, function.__qualname__)
        if key in STARTS_JOB:
            return "job"
        if key in STARTS_PROCESS:
            layer = "process"
            continue
        if not function.__module__.startswith("tests."):
            continue
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if name in PROCESS_NAMES or (isinstance(value, ModuleType) and value.__name__ in PROCESS_MODULES):
                layer = "process"
            elif isinstance(value, type):
                pending += [_plain(member) for member in vars(value).values()]
            else:
                pending.append(_plain(value))
    return layer


def _plain(function: Any) -> Any:
    """Return the function behind a method, a decorated function, a fixture or a context manager."""
    function = getattr(function, "__pytest_wrapped__", function)
    function = getattr(function, "obj", function)
    function = function.__func__ if isinstance(function, MethodType | classmethod | staticmethod) else function
    return getattr(function, "__wrapped__", function)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
