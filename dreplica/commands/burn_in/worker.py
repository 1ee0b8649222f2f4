"""One replica of `dreplica burn-in`: run passes until the time is over."""

import argparse
import errno
import gc
import json
import logging
import shutil
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from dreplica.commands.burn_in.cards import Account, PassDone, ask_health
from dreplica.commands.burn_in.job_config import check_job, job_of, parse_duration, pass_of
from dreplica.commands.burn_in.passes import Pass
from dreplica.commands.burn_in.record import CONFIG_NAME, Ended, Record
from dreplica.commands.burn_in.table import PassLines, print_account
from dreplica.distributed.liveness.lost import exit_code_of, is_reporter
from dreplica.distributed.liveness.monitor import find_lost_replicas
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.manifest import collect_manifest
from dreplica.errors import ExitCode, UsageError
from dreplica.report.record.run_folder import create_run_folder
from dreplica.report.record.terminal import Screen
from dreplica.run.bootstrap import Prepared, exit_now, start_replica

log = logging.getLogger(__name__)

MOST_KEPT = 100
"""Maximum number of passes whose reports are kept, so that a device that fails in each pass does not fill the disk."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MOST_IDLE = 3
"""Passes in a row without a compared step after which the burn-in ends."""


class Until(StopRequest):
    """A stop request that is also set once the time is over.

    Args:
        stop_request: The stop request of this replica.
        seconds: Seconds until the time is over, None on replicas that do not watch the time.
    """

    def __init__(self, stop_request: StopRequest, seconds: float | None) -> None:
        super().__init__()
        self._stop_request = stop_request
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def time_is_over(self) -> bool:
        """True if the time is over, by this replica's clock."""
        return self.end is not None and time.monotonic() >= self.end

    def __bool__(self) -> bool:
        return bool(self._stop_request) or self.time_is_over


class BurnIn:
    """A burn-in, on one replica.

    The methods are defined in the order in which they are called.

    Args:
        prepared: The config of the job, and the device of this replica.
        world: All replicas.
        stop_request: Set when this replica is asked to stop.
        seconds: Duration in seconds.
        as_json: Print the record as JSON instead of the tables.
    """

    def __init__(
        self, prepared: Prepared, world: World, stop_request: StopRequest, seconds: float, as_json: bool = False
    ) -> None:
        self.prepared, self.world, self.channel = prepared, world, world.channel
        self.stop_request, self.seconds, self.as_json = stop_request, seconds, as_json
        self.job = job_of(prepared.config)
        self.current: Pass | None = None
        self.console = Console(stderr=True) if as_json else Screen()

    def conduct(self) -> ExitCode:
        """Run the burn-in to its end. However it ends on one replica, it ends on all of them."""
        world = self.world
        world.together(lambda: check_job(self.job, self.prepared.own, world.num_replicas))
        manifest = collect_manifest(world, self.prepared.device, seed=None, data_digest="")
        self.account = Account(self.channel.gather(manifest), MOST_KEPT)
        self.query_health()
        self.record = Record(self.open_folder(), self.job, self.seconds)
        try:
            ended = self.run_passes()
            self.query_health()
            if world.is_coordinator:
                self.report(ended)
            self.channel.gather(
                None
            )  # wait for the report: the launcher terminates the rest when the first replica exits
            return exit_code(self.account, ended)
        except UsageError:
            if world.is_coordinator:
                self.report_unusable()
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            code = self.end_failed(error)
            if world.monitor is not None:
                exit_now(code)
            raise

    def query_health(self) -> None:
        """Add the current values of nvidia-smi to each device."""
        own = ask_health(self.account.cards[self.world.replica_id].uuid)
        for card, health in zip(self.account.cards, self.channel.gather(own), strict=True):
            card.health += [health] if health is not None else []

    def open_folder(self) -> Path:
        """Create the folder of the burn-in on rank 0, with the config of the job."""
        run = self.job.run

        def make() -> Path:
            folder = create_run_folder(run.root, f"burn-in-{run.name}")
            (folder / CONFIG_NAME).write_text(self.job.to_yaml(), encoding="utf-8")
            return folder

        return self.channel.gather(self.world.together(make if self.world.is_coordinator else lambda: None))[0]

    def run_passes(self) -> Ended:
        """Run passes until the end, and return how the burn-in ended."""
        logging.getLogger("dreplica").setLevel(logging.WARNING)  # the other messages of a pass are always the same
        lines = PassLines(self.console, self.seconds, self.world.is_coordinator)
        until = self.until = Until(self.stop_request, self.seconds if self.world.is_coordinator else None)
        number, idle = 0, 0
        while not any(self.channel.gather(bool(until))):
            number += 1
            done = self.run_pass(number)
            self.note(done)
            lines.show(done, self.record.again(done, self.account.cards))
            idle = 0 if done.steps else idle + 1
            if idle == _MOST_IDLE:
                return "idle"
        return "time" if self.channel.gather(until.time_is_over)[0] else "told"

    def run_pass(self, number: int) -> PassDone:
        """Run one pass, from the build on.

        Raises:
            UsageError: The disk is full.
        """
        config = pass_of(self.job, number, self.record.folder)
        own = config.for_replica(self.world.replica_id)
        self.current = Pass(number, Prepared(config, own, self.prepared.device), self.world, self.until)
        try:
            verdict = self.current.run.reach_verdict()
            keep = verdict.cause != "none" and self.account.num_found < MOST_KEPT
            done = self.current.done(verdict, keep)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self.record.cannot_write(error) from None
        self.current = None
        gc.collect()  # free reference cycles of models and hooks, whose memory the next pass needs
        return done

    def note(self, done: PassDone) -> None:
        """Add a pass to the account, and write the account into the folder."""
        self.account.add(done)
        write = partial(self.record.add, done, self.account)
        self.world.together(write if self.world.is_coordinator else lambda: None)

    def report(self, ended: Ended, code: ExitCode | None = None, done: PassDone | None = None) -> None:
        """Write and print the account, on one replica. If writing fails, the account is still printed.

        Args:
            ended: How the burn-in ended.
            code: The exit code, None to derive it from the account.
            done: A pass that is not written yet.
        """
        code = exit_code(self.account, ended) if code is None else code
        summary = self.record.summary(self.account, ended, code)
        try:
            if done is not None:
                self.record.append(done)
            self.record.write(summary)
        except OSError as error:
            log.error("%s could not be written: %s", self.record.folder, error)
        if self.as_json:
            Screen().out(json.dumps(summary, indent=1), highlight=False)
        else:
            print_account(self.console, self.account, summary)

    def report_unusable(self) -> None:
        """Report a burn-in whose input is unusable. Without a completed pass, remove its folder instead."""
        if self.account.passes:
            self.report("unusable", ExitCode.UNUSABLE)
        else:
            shutil.rmtree(self.record.folder)

    def end_failed(self, error: BaseException) -> ExitCode:
        """End this replica after it failed or, on `ReplicaLost`, another one. Return its exit code."""
        current, done = self.current, None
        if current is None:
            traceback.print_exception(error)
            lost = find_lost_replicas(self.world.monitor, error)
        else:
            lost = current.run.conclude_failed(error)
            done = current.cut_off(lost, error)
            self.account.add(done)
        ended: Ended = "unusable" if exit_code_of(lost) is ExitCode.UNUSABLE else "lost"
        if ended == "lost":
            self.account.lose(lost)
        code = exit_code(self.account, "lost", exit_code_of(lost))
        has_reported = any(item.replica_id == 0 and item.code == "unusable" for item in lost)
        if not has_reported and is_reporter(lost, self.world.replica_id, self.world.num_replicas):
            self.report(ended, code, done)
        return code


def exit_code(account: Account, ended: Ended, default: ExitCode = ExitCode.AGREED) -> ExitCode:
    """Return the exit code of a burn-in.

    Args:
        account: The account. A finding takes precedence over how the burn-in ended.
        ended: How the burn-in ended.
        default: The code without a finding, unless the burn-in was stopped.
    """
    if account.num_found:
        return ExitCode.DIVERGED
    return ExitCode.STOPPED if ended == "told" else default


def work(argv: Sequence[str]) -> ExitCode:
    """Run one replica of `dreplica burn-in`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--for", dest="duration", required=True)
    parser.add_argument("--json", action="store_true")
    known, settings = parser.parse_known_args(argv)

    def conduct(prepared: Prepared, world: World, stop_request: StopRequest) -> ExitCode:
        return BurnIn(prepared, world, stop_request, parse_duration(known.duration), known.json).conduct()

    return start_replica(settings, conduct)
