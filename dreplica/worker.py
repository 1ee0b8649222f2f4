"""One worker: what torchrun starts, once per replica, whatever it is to do."""

import os
import sys
from importlib import import_module
from typing import NoReturn

from dreplica.errors import ExitCode
from dreplica.run.process import run_process

_OTHER_WORK = {
    "bench": "dreplica.commands.bench.worker",
    "burn-in": "dreplica.commands.burn_in.worker",
    "flags": "dreplica.commands.flags.trial",
}
"""What a worker does besides training, by the first word of its command line: a module, whose `work` does it."""


def main() -> NoReturn:
    """Does what this process's command line says, by default train, and exits with the exit code of that."""
    run_process(_work)


def _work() -> ExitCode:
    argv = sys.argv[1:]
    if argv and argv[0] in _OTHER_WORK:
        return import_module(_OTHER_WORK[argv[0]]).work(argv[1:])

    from dreplica.config.help import format_help
    from dreplica.run.run import run_worker

    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(format_help("train.py"))
        return ExitCode.AGREED
    return run_worker(argv)


if __name__ == "__main__":
    main()
