"""Starts the workers of a run with torchrun's own launcher, and tells their exit codes apart."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from dreplica.errors import ExitCode
from dreplica.worker import EXIT_CODES


def launch(module: str, arguments: Sequence[str], num_replicas: int) -> ExitCode:
    """Runs `python -m module arguments...` once per replica on this node, and returns the run's exit code.

    torchrun collapses the workers' codes to 1; here the run's code is theirs, and where they differ (some were ended
    because another failed) the one that says most: unusable, diverged, stopped, failed.
    """
    # The workers have said what went wrong; the launcher's own summary would bury it under a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    options = ["--standalone", f"--nproc_per_node={num_replicas}", "--module", module]
    with tempfile.TemporaryDirectory(prefix="dreplica-codes-") as folder:
        os.environ[EXIT_CODES] = folder
        try:
            run(get_args_parser().parse_args([*options, *arguments]))
        except SignalException:  # it does not say with which codes the workers have ended
            codes = {int(path.read_text()) for path in Path(folder).iterdir()}
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
        else:
            return ExitCode.AGREED
        finally:
            del os.environ[EXIT_CODES]
    for code in (ExitCode.UNUSABLE, ExitCode.DIVERGED, ExitCode.STOPPED):
        if code in codes:
            return code
    return ExitCode.FAILED
