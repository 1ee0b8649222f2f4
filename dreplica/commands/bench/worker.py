"""`dreplica bench`, on one replica."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from dreplica.commands.bench.loops import Bench
from dreplica.commands.bench.results import print_measured
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StoppedOnRequest, StopRequest
from dreplica.errors import ExitCode
from dreplica.run.bootstrap import Prepared, meet


def work(argv: Sequence[str]) -> ExitCode:
    """One worker of the benchmark."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int)
    known, settings = parser.parse_known_args(argv)

    def conduct(prepared: Prepared, world: World, stop_request: StopRequest) -> ExitCode:
        world.together(lambda: None)  # another replica's input may be unusable
        bench = Bench(prepared.own, world, prepared.device.device, known.steps)
        try:
            measured = bench.measure(known.rounds, stop_request)
        except StoppedOnRequest:
            return ExitCode.STOPPED
        if world.is_coordinator:
            snapshot_every = bench.config.agreement.snapshot_every
            print_measured(Console(), measured, world.num_replicas, bench.steps, snapshot_every)
        return ExitCode.AGREED

    return meet(settings, conduct)
