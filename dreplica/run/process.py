"""Lifecycle of a worker process: signals first, then its work, then an exit code.

This module must not import torch at the top: signals that arrive before `run_process` would end the process.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from dreplica.distributed.launch import exit_codes
from dreplica.distributed.signals import block_stop_signals
from dreplica.errors import ExitCode


def run_process(work: Callable[[], ExitCode]) -> NoReturn:
    """Run `work` in this process, then exit with the code it returns.

    Args:
        work: The entry point of the worker. It imports what it needs, and returns the exit code.
    """
    block_stop_signals()  # first of all: what else is imported takes seconds, and a group that stops, stops as one
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
    exit_codes.report(int(code))
    sys.exit(int(code))
