"""Entry point of a training process: `python -m dreplica.worker`, started once per replica by torchrun."""

import os
import sys
from typing import NoReturn

from dreplica.errors import ExitCode
from dreplica.run.process import run_process


def main() -> NoReturn:
    """Train one replica as the command line says, and exit the process with the run's exit code."""
    run_process(_train)


def _train() -> ExitCode:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        from dreplica.config.help import format_help

        if os.environ.get("RANK", "0") == "0":
            print(format_help("train.py"))
        return ExitCode.AGREED

    from dreplica.run.run import run_worker

    return run_worker(argv)


if __name__ == "__main__":
    main()
