"""Run worker processes in the background, with their output kept in a file."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreplica.config.paths import IMPORT_ROOT
from dreplica.distributed.launch.error_record import ERROR_FILE, read_error
from dreplica.errors import UsageError

_LAUNCH = """
import sys
from dreplica.distributed.launch.launcher import launch
sys.exit(launch(sys.argv[1], sys.argv[3:], int(sys.argv[2])))
"""
_SHUTDOWN_SECONDS = 5


@dataclass(frozen=True)
class Finished:
    """The end of worker processes that ran in the background."""

    code: int | None
    """Exit code, or None if the workers were terminated at the timeout."""
    output: str
    """Everything that the workers and the launcher printed."""
    error: UsageError | None = None
    """The error for which the workers exited with `ExitCode.UNUSABLE`."""


def run_in_background(
    module: str,
    arguments: Sequence[str],
    num_replicas: int,
    log: Path,
    timeout: float | None = None,
    variables: Mapping[str, str | None] | None = None,
) -> Finished:
    """Run `python -m module arguments...` once per replica, and wait for the end.

    No process is left running, also if an exception ends the wait.

    Args:
        module: The entry point of the workers.
        arguments: Command-line arguments of each worker.
        num_replicas: Number of workers.
        log: File that the output is appended to. An error is recorded next to it.
        timeout: Seconds until the workers are terminated, or None to wait without a limit.
        variables: Environment variables to set in the workers, or to remove where the value is None.

    Returns:
        The exit code, the output and, if the workers could not use their input, the error.
    """
    record = log.with_suffix(".error.json").absolute()
    record.unlink(missing_ok=True)
    environment = os.environ | {
        ERROR_FILE: str(record),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(IMPORT_ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }
    for name, value in (variables or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, module, str(num_replicas), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then terminates the launcher
        )
        code = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Read before terminating: the launcher would add how it was terminated.
            printed = log.read_bytes()[start:].decode(errors="replace")
            _end(process)
    return Finished(code, printed, read_error(record))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate the launcher and its workers.

    The launcher terminates the workers, since each runs in its own session.
    """
    process.terminate()
    try:
        process.wait(2 * _SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
