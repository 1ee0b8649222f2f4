"""One worker: what torchrun starts, once per replica, whatever it is to do."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from dreplica import exit_codes
from dreplica.errors import ExitCode
from dreplica.world.signals import hold_signals

_OTHER_WORK = {"bench": "dreplica.bench.worker", "burn-in": "dreplica.burn_in.worker", "flags": "dreplica.flags.trial"}
"""What a worker does besides training, by the first word of its command line: a module, whose `work` does it."""


def main() -> NoReturn:
    """Does what this process's command line says, by default train, and exits with the exit code of that."""
    run_process(_work)


def run_process(work: Callable[[], ExitCode]) -> NoReturn:
    """Runs `work` as the whole of a worker process, and ends the process with the exit code it returns."""
    hold_signals()  # first of all: what else is imported takes seconds, and a group that stops, stops as one
    # Huge pages: torch reads this at its first allocation, and reading all state each step goes a quarter faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        code = record(work)()
        assert code is not None, "sys.exit(0) was called, which is no way for a run to end"
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # gloo's threads may still wait for other replicas, and a normal exit would wait for them.
        os._exit(ExitCode.FAILED)
    # The launcher ends the rest as soon as one worker has failed; each is to end with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_codes.leave(int(code))
    sys.exit(int(code))


def _work() -> ExitCode:
    argv = sys.argv[1:]
    if argv and argv[0] in _OTHER_WORK:
        return import_module(_OTHER_WORK[argv[0]]).work(argv[1:])

    from dreplica.config.help import format_help
    from dreplica.run import run_worker

    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(format_help("train.py"))
        return ExitCode.AGREED
    return run_worker(argv)


if __name__ == "__main__":
    main()
