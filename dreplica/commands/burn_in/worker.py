"""`dreplica burn-in`, on one replica: passes, until the time is up."""

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
from dreplica.distributed.liveness import exit_code_of, find_lost_replicas, is_reporter
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.manifest import collect_manifest
from dreplica.errors import ExitCode, UsageError
from dreplica.report.record.run_folder import create_run_folder
from dreplica.report.record.terminal import Screen
from dreplica.run.bootstrap import Prepared, exit_now, start_replica

log = logging.getLogger(__name__)

MOST_KEPT = 100
"""Passes whose reports are kept: a card that fails in each pass of a night must not fill the disk."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MOST_IDLE = 3
"""Passes in a row that end before a step is compared, after which there is no point in going on."""


class Until(StopRequest):
    """A request to stop, which is also there once the time is up. `seconds`: None on replicas that look at no clock."""

    def __init__(self, told: StopRequest, seconds: float | None) -> None:
        super().__init__()
        self._told = told
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def time_is_up(self) -> bool:
        """Whether it is, by this replica's clock."""
        return self.end is not None and time.monotonic() >= self.end

    def __bool__(self) -> bool:
        return bool(self._told) or self.time_is_up


class BurnIn:
    """One replica's part. The methods stand in the order in which they are called.

    Args:
        prepared: the job, and this replica's device.
        world: all replicas.
        told: set when this replica is told to stop.
        seconds: how long.
        as_json: print the record, in place of the tables.
    """

    def __init__(
        self, prepared: Prepared, world: World, told: StopRequest, seconds: float, as_json: bool = False
    ) -> None:
        self.prepared, self.world, self.channel = prepared, world, world.channel
        self.told, self.seconds, self.as_json = told, seconds, as_json
        self.job = job_of(prepared.config)
        self.current: Pass | None = None
        self.console = Console(stderr=True) if as_json else Screen()

    def conduct(self) -> ExitCode:
        """The whole burn-in. Every way it can end, on any replica, ends it on all of them."""
        world = self.world
        world.together(lambda: check_job(self.job, self.prepared.own, world.num_replicas))
        manifest = collect_manifest(world, self.prepared.device, seed=None, data_digest="")
        self.account = Account(self.channel.gather(manifest), MOST_KEPT)
        self.look_at_health()
        self.record = Record(self.open_folder(), self.job, self.seconds)
        try:
            ended = self.go_through_passes()
            self.look_at_health()
            if world.is_coordinator:
                self.tell(ended)
            self.channel.gather(None)  # nobody leaves before: the launcher ends the rest with the first
            return exit_code(self.account, ended)
        except UsageError:
            if world.is_coordinator:
                self.tell_unusable()
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            code = self.end_without(error)
            if world.monitor is not None:
                exit_now(code)
            raise

    def look_at_health(self) -> None:
        """Adds what nvidia-smi says of each card now. A collective."""
        own = ask_health(self.account.cards[self.world.replica_id].uuid)
        for card, health in zip(self.account.cards, self.channel.gather(own), strict=True):
            card.health += [health] if health is not None else []

    def open_folder(self) -> Path:
        """Of the whole burn-in, made by rank 0, with the job in it. A collective."""
        run = self.job.run

        def make() -> Path:
            folder = create_run_folder(run.root, f"burn-in-{run.name}")
            (folder / CONFIG_NAME).write_text(self.job.to_yaml(), encoding="utf-8")
            return folder

        return self.channel.gather(self.world.together(make if self.world.is_coordinator else lambda: None))[0]

    def go_through_passes(self) -> Ended:
        """Pass after pass, and how that came to an end. A collective."""
        logging.getLogger("dreplica").setLevel(logging.WARNING)  # what a pass has to say otherwise is always the same
        lines = PassLines(self.console, self.seconds, self.world.is_coordinator)
        until = self.until = Until(self.told, self.seconds if self.world.is_coordinator else None)
        number, idle = 0, 0
        while not any(self.channel.gather(bool(until))):
            number += 1
            done = self.run_pass(number)
            self.note(done)
            lines.show(done, self.record.again(done, self.account.cards))
            idle = 0 if done.steps else idle + 1
            if idle == _MOST_IDLE:
                return "idle"
        return "time" if self.channel.gather(until.time_is_up)[0] else "told"

    def run_pass(self, number: int) -> PassDone:
        """One pass, from the build on. A collective. Raises UsageError where there is no room for its record."""
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
        gc.collect()  # a model and its hooks refer to each other, and the next pass needs their room
        return done

    def note(self, done: PassDone) -> None:
        """Enters a pass into the account, and the account into the folder. A collective."""
        self.account.add(done)
        write = partial(self.record.add, done, self.account)
        self.world.together(write if self.world.is_coordinator else lambda: None)

    def tell(self, ended: Ended, code: ExitCode | None = None, done: PassDone | None = None) -> None:
        """Writes and prints what was found, by one replica; that one of the two fails takes nothing from the other.

        `done`: a pass that is not written down yet.
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

    def tell_unusable(self) -> None:
        """Where input turns out to be unusable: there is nothing to tell, unless there was a pass before."""
        if self.account.passes:
            self.tell("unusable", ExitCode.UNUSABLE)
        else:
            shutil.rmtree(self.record.folder)

    def end_without(self, error: BaseException) -> ExitCode:
        """Ends this replica when it fails or (`ReplicaLost`) another is gone. No collective."""
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
        has_told = any(item.replica_id == 0 and item.code == "unusable" for item in lost)
        if not has_told and is_reporter(lost, self.world.replica_id, self.world.num_replicas):
            self.tell(ended, code, done)
        return code


def exit_code(account: Account, ended: Ended, otherwise: ExitCode = ExitCode.AGREED) -> ExitCode:
    """What was found counts before how it ended; `otherwise`: where nothing was, and nobody had stopped it."""
    if account.num_found:
        return ExitCode.DIVERGED
    return ExitCode.STOPPED if ended == "told" else otherwise


def work(argv: Sequence[str]) -> ExitCode:
    """One worker of a burn-in."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--for", dest="duration", required=True)
    parser.add_argument("--json", action="store_true")
    known, settings = parser.parse_known_args(argv)

    def conduct(prepared: Prepared, world: World, told: StopRequest) -> ExitCode:
        return BurnIn(prepared, world, told, parse_duration(known.duration), known.json).conduct()

    return start_replica(settings, conduct)
