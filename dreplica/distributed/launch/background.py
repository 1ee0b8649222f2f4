"""Workers under a launcher of their own in the background: what they print is kept, and they are ended in order."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dreplica.config.paths import IMPORT_ROOT

_LAUNCH = """
import sys
from dreplica.distributed.launch.launcher import launch
sys.exit(launch(sys.argv[1], sys.argv[3:], int(sys.argv[2])))
"""
_SHUTDOWN_SECONDS = 5


def run_in_background(
    module: str,
    arguments: Sequence[str],
    num_replicas: int,
    log: Path,
    timeout: float,
    variables: Mapping[str, str | None] | None = None,
) -> tuple[int | None, str]:
    """Runs `python -m module arguments...` once per replica; returns the exit code, and what was printed.

    Nothing is left running, whatever ends the wait; the code is None if they did not end by themselves within `timeout`
    seconds. What they print goes to the file `log`. `variables`: of their environment; None: not set.
    """

    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(IMPORT_ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }
    for name, value in (variables or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, module, str(num_replicas), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, which then ends the launcher in order
        )
        code = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            printed = log.read_text(encoding="utf-8", errors="replace")  # before the launcher says how it was ended
            _end(process)
    return code, printed


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends launcher and workers, if they run. Workers are in sessions of their own: the launcher ends them."""
    process.terminate()
    try:
        process.wait(2 * _SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
