"""Start of the workers of a run with torchrun's launcher, with an exit code per outcome."""

import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from dreplica.distributed.launch import exit_codes
from dreplica.distributed.rendezvous.rendezvous import rendezvous
from dreplica.distributed.rendezvous.store import Endpoint
from dreplica.errors import ExitCode

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
"""Signals forwarded to workers: torchrun's defaults, and SIGUSR2, which batch systems send before the time limit."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, and which of them this is."""

    num_nodes: int
    """Number of nodes."""
    node_rank: int
    """Rank of this node: 0 on the node at `head`."""
    head: str
    """Address of node 0 for the rendezvous, as `host:port`."""
    timeout: float = 300.0
    """Longest wait for the other nodes, in seconds."""

    @property
    def endpoint(self) -> Endpoint:
        """The address of node 0."""
        host, _, port = self.head.rpartition(":")
        return Endpoint(host.removeprefix("[").removesuffix("]"), int(port), "node", "--head", "--head")


def launch(module: str, arguments: Sequence[str], num_replicas: int, nodes: Nodes | None = None) -> ExitCode:
    """Run `python -m module arguments...` once per replica on this node.

    torchrun reports 1 for every failure. This reports the workers' own code. Where codes differ, since some workers
    were ended after another failed, it is the most informative: unusable, diverged, stopped, failed.

    Args:
        module: The entry point of the workers.
        arguments: Command-line arguments of each worker.
        num_replicas: Number of replicas on this node.
        nodes: The nodes of the run, or None for this node alone.

    Returns:
        The exit code of the run.

    Raises:
        UsageError: The address of node 0 cannot be used.
        NotArrived: Other nodes did not arrive in time.
    """
    store = None  # kept until the end, since torchrun uses its server
    if nodes is not None:
        store = rendezvous(nodes.endpoint, nodes.node_rank, nodes.num_nodes, nodes.timeout, serves=nodes.node_rank == 0)
    # The workers have reported the error; the launcher's summary would bury it under a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    options = [f"--nproc_per_node={num_replicas}", f"--signals-to-handle={_SIGNALS}", *_rendezvous_options(nodes)]
    with exit_codes.collect() as reported_codes:
        try:
            run(get_args_parser().parse_args([*options, "--module", module, *arguments]))
        except SignalException:
            reported = reported_codes()  # stopped on request: all workers have stopped at the same step
            if len(reported) == num_replicas and set(reported.values()) == {ExitCode.AGREED}:
                return ExitCode.AGREED
            return _most_informative(reported.values())
        except ChildFailedError as error:
            for rank, failure in error.failures.items():
                if failure.exitcode < 0:  # killed by a signal, so it reported nothing
                    print(f"replica {rank} was terminated by {failure.signal_name()}", file=sys.stderr)
            codes = {failure.exitcode for failure in error.failures.values()} | set(reported_codes().values())
            return _most_informative(codes)
    del store
    return ExitCode.AGREED


def _rendezvous_options(nodes: Nodes | None) -> list[str]:
    if nodes is None:
        return ["--standalone"]
    # Static, so that a node keeps its ranks over restarts: rank 0, which writes the run folder, stays on node 0.
    address = [f"--master-addr={nodes.endpoint.host}", f"--master-port={nodes.endpoint.port}"]
    return ["--rdzv-backend=static", f"--nnodes={nodes.num_nodes}", f"--node-rank={nodes.node_rank}", *address]


def _most_informative(codes: Collection[int]) -> ExitCode:
    for code in (ExitCode.UNUSABLE, ExitCode.DIVERGED, ExitCode.STOPPED):
        if code in codes:
            return code
    return ExitCode.FAILED
