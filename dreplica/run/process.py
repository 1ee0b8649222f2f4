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
    block_stop_signals()  # first: later imports take seconds, and a stopped group must stop together
    # Use huge pages: reading all state at each step is a quarter faster. torch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Without c10d's warnings: it prints a C++ stack for each connection that another process closes, which is reported
    # by name here. torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        code = record(work)()
        assert code is not None, "sys.exit(0) was called during the run"
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # gloo's threads may still wait for other replicas, and a normal exit waits for these threads.
        os._exit(ExitCode.FAILED)
    # Ignore SIGTERM: the launcher terminates the rest once one worker has failed, but each exits with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_codes.report(int(code))
    sys.exit(int(code))
