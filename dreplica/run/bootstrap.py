"""How replicas meet, and how they part when a run cannot go on."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig
from dreplica.distributed.log_setup import set_up_logging
from dreplica.distributed.process_group import World, env_num_replicas, env_rank, open_world
from dreplica.distributed.signals import StopRequest, stop_signals
from dreplica.environment.determinism import apply_determinism, set_environment
from dreplica.environment.device import Device, bind_device
from dreplica.errors import ExitCode, SharedUsageError, UsageError

log = logging.getLogger(__name__)

_DEFAULT_TIMEOUT = 300.0


@dataclass(frozen=True)
class Prepared:
    """What is decided before replicas meet."""

    config: RunConfig
    """As given: the same on all replicas."""
    own: RunConfig
    """With this replica's overrides."""
    device: Device
    warnings: list[str] = field(default_factory=list)
    """For the report."""


def meet(argv: Sequence[str], conduct: Callable[[Prepared, World, StopRequest], ExitCode]) -> ExitCode:
    """Prepares this replica, joins the others and conducts what they are there for; unusable input ends all of them.

    `conduct` begins with `World.together`, at which it learns whether another replica's input is unusable. Raises what
    `conduct` raises; then end the process as `worker.run_process` does.
    """
    set_up_logging(env_rank())
    prepared: Prepared | UsageError
    try:
        prepared = prepare(argv)
    except UsageError as error:
        prepared = error  # raised once the replicas have met, so that all of them end
    timeout = _DEFAULT_TIMEOUT if isinstance(prepared, UsageError) else prepared.config.world.timeout
    with open_world(timeout) as world, stop_signals() as stop_request:
        try:
            if isinstance(prepared, UsageError):
                world.together(partial(_refuse, prepared))
            assert isinstance(prepared, Prepared)
            return conduct(prepared, world, stop_request)
        except UsageError as error:
            return end_unusable(error, world)


def end_unusable(error: UsageError, world: World) -> ExitCode:
    """Prints the message once, however many replicas raise it. Does not return where others may be left behind."""
    shared = isinstance(error, SharedUsageError)
    if world.is_coordinator if shared or world.monitor is None else world.monitor.report_failure(error, unusable=True):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if shared:
        world.channel.gather(None)  # nobody leaves before it is printed: the launcher ends the rest with the first
    elif world.monitor is not None:
        end_at_once(ExitCode.UNUSABLE)
    return ExitCode.UNUSABLE


def end_at_once(code: ExitCode) -> NoReturn:
    """Ends the process. gloo's threads may still wait for a lost replica, and a normal exit would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(argv: Sequence[str]) -> Prepared:
    """Reads the config, and puts determinism settings and device into effect. Raises UsageError."""
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


def _refuse(error: UsageError) -> None:
    raise error
