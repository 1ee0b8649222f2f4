"""Start of a replica: read the config, bind the device, join the process group, and exit when a run cannot start."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from dreplica.config.load import load_config, world_timeout
from dreplica.config.schema import RunConfig
from dreplica.distributed.launch.environment import detect_launch
from dreplica.distributed.launch.error_record import write_error
from dreplica.distributed.liveness.lost import ReplicaLost, exit_code_of, is_reporter
from dreplica.distributed.liveness.monitor import find_lost_replicas
from dreplica.distributed.log_setup import set_up_logging
from dreplica.distributed.process_group import World, env_num_replicas, env_rank, open_world
from dreplica.distributed.signals import StopRequest, stop_signals
from dreplica.environment.determinism import apply_determinism, set_environment
from dreplica.environment.device import Device, bind_device
from dreplica.errors import ExitCode, SharedUsageError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The config and the device of one replica, known before the process group is initialized."""

    config: RunConfig
    """The config as given, the same on all replicas."""
    own: RunConfig
    """The config with this replica's overrides."""
    device: Device
    """The device that this process is bound to."""
    warnings: list[str] = field(default_factory=list)
    """Warnings for the report."""


def start_replica(argv: Sequence[str], conduct: Callable[[Prepared, World, StopRequest], ExitCode]) -> ExitCode:
    """Prepare this replica, initialize the process group and run `conduct`.

    Unusable input on any replica ends all of them before `conduct` is called. After an exception, end the process as
    `run_process` does.

    Args:
        argv: The config settings from the command line.
        conduct: The work of this replica. Its exceptions are raised here, except `UsageError`.

    Returns:
        The exit code of this process.
    """
    try:
        launch = detect_launch(os.environ)
        if not launch.is_alone:
            launch.require_address()
    except UsageError as error:
        _report_unusable(error)  # on each process: none can reach the others
        return ExitCode.UNUSABLE
    if not launch.is_alone:
        os.environ |= launch.variables()  # srun and mpirun set others, which neither torch nor the user's code reads
    set_up_logging(launch.rank)
    prepared: Prepared | UsageError
    try:
        prepared = prepare(argv)
    except UsageError as error:
        prepared = error  # raised after the rendezvous, so that all replicas end
    timeout = world_timeout(argv) if isinstance(prepared, UsageError) else prepared.config.world.timeout
    try:
        with open_world(timeout) as world, stop_signals() as stop_request:
            try:
                return conduct(_share(prepared, world), world, stop_request)
            except UsageError as error:
                return exit_unusable(error, world)
    except UsageError as error:  # of the rendezvous
        if launch.rank == 0 or not isinstance(error, SharedUsageError):
            _report_unusable(error)
        return ExitCode.UNUSABLE
    except ReplicaLost as error:
        if "reports" not in error.fields:
            raise
        if error.fields["reports"]:
            print(f"error: {error}", file=sys.stderr, flush=True)
        exit_now(exit_code_of(error.lost))


def _share(prepared: Prepared | UsageError, world: World) -> Prepared:
    """Return what was prepared, if that succeeded on all replicas.

    Raises:
        SharedUsageError: A config or an environment is unusable.
        ReplicaLost: Another replica was lost meanwhile. It has the field `reports`.
    """
    try:
        return world.together(partial(_unless_unusable, prepared))
    except ReplicaLost as error:
        lost = find_lost_replicas(world.monitor, error)
        text = "; ".join(f"replica {item.replica_id}: {item.reason}" for item in lost) or str(error)
        reports = is_reporter(lost, world.replica_id, world.num_replicas)
        raise ReplicaLost(text, code=error.code, lost=lost, reports=reports) from error


def exit_unusable(error: UsageError, world: World) -> ExitCode:
    """Print the error once for all replicas and end this one.

    Args:
        error: The error, which one replica or (`SharedUsageError`) all replicas raised.
        world: All replicas.

    Returns:
        The exit code. Does not return if other replicas may still be waiting: the process exits instead.
    """
    shared = isinstance(error, SharedUsageError)
    if world.is_coordinator if shared or world.monitor is None else world.monitor.report_failure(error, unusable=True):
        _report_unusable(error)
    if shared:
        # Wait until it is printed: the launcher terminates the other replicas when the first one exits.
        world.channel.gather(None)
    elif world.monitor is not None:
        exit_now(ExitCode.UNUSABLE)
    return ExitCode.UNUSABLE


def _report_unusable(error: UsageError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    write_error(error)


def exit_now(code: ExitCode) -> NoReturn:
    """Exit without cleanup: gloo's threads may still wait for a lost replica, and a normal exit waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(argv: Sequence[str]) -> Prepared:
    """Load the config, bind the device and apply the determinism settings.

    Raises:
        UsageError: The config is invalid, or this environment cannot run it.
    """
    config = load_config(argv, env_num_replicas())
    own = config.for_replica(env_rank())
    problem = set_environment(own.determinism)
    device = bind_device(own.world)
    apply_determinism(own.determinism)
    if problem is None or device.device.type != "cuda":
        return Prepared(config, own, device)
    if own.determinism.mode == "strict":
        raise UsageError(problem)
    log.warning(problem)
    return Prepared(config, own, device, [problem])


def _unless_unusable(prepared: Prepared | UsageError) -> Prepared:
    if isinstance(prepared, UsageError):
        raise prepared
    return prepared
