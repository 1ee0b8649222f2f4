"""The command line that started the workers of this run."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

_LAUNCHERS = {"torchrun", "dreplica"}
_MODULES = {"torch.distributed.run", "torch.distributed.launch"}


def launch_command() -> list[str] | None:
    """Return the command of this worker's launcher, as its user would type it.

    Returns:
        The arguments, beginning with `torchrun`, `dreplica` or `python`, or None if the launcher is another program.
    """
    try:
        content = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    return typed_command([os.fsdecode(argument) for argument in content.split(b"\0")[:-1]])


def typed_command(arguments: Sequence[str]) -> list[str] | None:
    """Return the command that a launcher's process was started with, without the interpreter of a script.

    Args:
        arguments: The arguments of the process, the program first.

    Returns:
        The command, or None if the process is not a launcher that trains when it is started again.
    """
    if not arguments:
        return None
    rest = list(arguments)
    if Path(rest[0]).name.startswith("python"):
        if rest[1:2] == ["-m"] and rest[2:3]:
            trains = rest[2].startswith("dreplica.") and rest[3:4] == ["train"]
            return rest if trains or rest[2] in _MODULES else None
        rest = rest[1:]
    name = Path(rest[0]).name if rest else ""
    if name not in _LAUNCHERS or (name == "dreplica" and rest[1:2] != ["train"]):
        return None
    found = shutil.which(name)
    program = name if found is not None and os.path.realpath(found) == os.path.realpath(rest[0]) else rest[0]
    return [program, *rest[1:]]


def with_option(command: Sequence[str], option: str, value: str) -> list[str]:
    """Return a command in which an option has a value, whether it had one before or not.

    Args:
        command: The command.
        option: The option, such as `--run.resume`.
        value: Its value.
    """
    result, skips = [], False
    for argument in command:
        if skips:
            skips = False
        elif argument == option:
            skips = True
        elif not argument.startswith(f"{option}="):
            result.append(argument)
    return [*result, option, value]
