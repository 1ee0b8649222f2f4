"""Entry point of a training process: `python -m dreplica.worker`, started once per replica by torchrun."""

import os
import sys
from typing import NoReturn

from dreplica.errors import ExitCode, UsageError
from dreplica.run.process import run_process


def main() -> NoReturn:
    """Train one replica as the command line says, and exit the process with the run's exit code."""
    run_process(_train)


def _train() -> ExitCode:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv or any(token.startswith("--help=") for token in argv):
        return _print_help(argv)

    from dreplica.run.run import run_worker

    return run_worker(argv)


def _print_help(argv: list[str]) -> ExitCode:
    """Print the help text, on rank 0 only."""
    from dreplica.config.help import format_help, help_topic
    from dreplica.distributed.launch.environment import detect_launch

    is_first = True
    try:
        is_first = detect_launch(os.environ).rank == 0
        text = format_help("train.py", help_topic(argv) or "")
    except UsageError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr)
        return ExitCode.UNUSABLE
    if is_first:
        print(text)
    return ExitCode.AGREED


if __name__ == "__main__":
    main()
