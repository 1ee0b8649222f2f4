"""One replica of `dreplica bench`."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from dreplica.commands.bench.loops import Bench
from dreplica.commands.bench.results import print_measured
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StoppedOnRequest, StopRequest
from dreplica.errors import ExitCode
from dreplica.run.bootstrap import Prepared, start_replica
from dreplica.run.session import Session


def work(argv: Sequence[str]) -> ExitCode:
    """Run one replica of `dreplica bench`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int)
    known, settings = parser.parse_known_args(argv)

    def conduct(prepared: Prepared, world: World, stop_request: StopRequest) -> ExitCode:
        bench = Bench(Session(prepared, world, stop_request), known.steps)
        try:
            measured = bench.measure(known.rounds)
        except StoppedOnRequest:
            return ExitCode.STOPPED
        if world.is_coordinator:
            snapshot_every = bench.config.agreement.snapshot_every
            print_measured(Console(), measured, world.num_replicas, bench.steps, snapshot_every)
        return ExitCode.AGREED

    return start_replica(settings, conduct)
