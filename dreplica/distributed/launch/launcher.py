"""Starts the workers of a run with torchrun's own launcher, and tells their exit codes apart."""

import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from dreplica.distributed.launch import exit_codes
from dreplica.errors import ExitCode

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
"""That are passed on to workers: torchrun's own, and the one that batch systems are asked to send ahead of the end."""


@dataclass(frozen=True)
class Nodes:
    """The machines that a run is spread over, and which of them this is."""

    num_nodes: int
    node_rank: int
    """This one's place: 0 on the machine that `head` names."""
    head: str
    """Its address, `host:port`: where replicas meet."""


def launch(module: str, arguments: Sequence[str], num_replicas: int, nodes: Nodes | None = None) -> ExitCode:
    """Runs `python -m module arguments...` once per replica on this node, and returns the run's exit code.

    `num_replicas`: on this node, which is the only one without `nodes`. torchrun collapses the workers' codes to 1;
    here the run's code is theirs, and where they differ (some were ended because another failed) the one that says
    most: unusable, diverged, stopped, failed.
    """
    # The workers have said what went wrong; the launcher's own summary would bury it under a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    options = [f"--nproc_per_node={num_replicas}", f"--signals-to-handle={_SIGNALS}", *_meeting_point(nodes)]
    with exit_codes.collect() as left:
        try:
            run(get_args_parser().parse_args([*options, "--module", module, *arguments]))
        except SignalException:
            codes = left()  # asked to stop: the workers have, all at the same step
            if len(codes) == num_replicas and set(codes.values()) == {ExitCode.AGREED}:
                return ExitCode.AGREED
            return _most_telling(codes.values())
        except ChildFailedError as error:
            for rank, failure in error.failures.items():
                if failure.exitcode < 0:  # it had no time to say anything
                    print(f"replica {rank} was ended by {failure.signal_name()}", file=sys.stderr)
            return _most_telling({failure.exitcode for failure in error.failures.values()} | set(left().values()))
    return ExitCode.AGREED


def _meeting_point(nodes: Nodes | None) -> list[str]:
    if nodes is None:
        return ["--standalone"]
    # Static, for a node keeps its replicas' ids over restarts: rank 0, which writes the run folder, is at the head.
    host, _, port = nodes.head.rpartition(":")
    place = [f"--master-addr={host}", f"--master-port={port}"]
    return ["--rdzv-backend=static", f"--nnodes={nodes.num_nodes}", f"--node-rank={nodes.node_rank}", *place]


def _most_telling(codes: Collection[int]) -> ExitCode:
    for code in (ExitCode.UNUSABLE, ExitCode.DIVERGED, ExitCode.STOPPED):
        if code in codes:
            return code
    return ExitCode.FAILED
