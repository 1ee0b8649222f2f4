"""The record of a burn-in: `burn_in.jsonl`, a line per pass, and `burn_in.json`, the account so far."""

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dreplica.agreement.trace.json_file import write_json
from dreplica.commands.burn_in.cards import Account, Card, PassDone
from dreplica.config.schema import RunConfig
from dreplica.errors import ExitCode, UsageError

SCHEMA = 1
CONFIG_NAME = "config.yaml"
_LINES, _ACCOUNT = "burn_in.jsonl", "burn_in.json"

Ended = Literal["time", "told", "idle", "lost", "unusable"]
"""How a burn-in ends: the time is over, it was stopped, no pass reached a step, a replica was lost, or its input became
unusable."""


class Record:
    """The files of a burn-in, written by one replica.

    Args:
        folder: The folder of the burn-in.
        job: The config that each pass trains.
        seconds: Requested duration of the burn-in, in seconds.
    """

    def __init__(self, folder: Path, job: RunConfig, seconds: float) -> None:
        self.folder = folder
        self._job, self._seconds = job, seconds
        self._began, self._started = datetime.now(UTC), time.monotonic()

    def add(self, done: PassDone, account: Account) -> None:
        """Write a pass and the account to disk at once, since the next pass may not end.

        Raises:
            UsageError: The files cannot be written.
        """
        try:
            self.append(done)
            self.write(self.summary(account, None, None))
        except OSError as error:
            raise self.cannot_write(error) from None

    def cannot_write(self, error: OSError) -> UsageError:
        """Return the error for files that cannot be written."""
        return UsageError(
            f"run.root: {str(self.folder)!r} can no longer be written to ({error.strerror}). Free disk space, or use "
            "another folder with --run.root."
        )

    def append(self, done: PassDone) -> None:
        """Append a pass to burn_in.jsonl.

        Raises:
            OSError: The file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # it may be missing on other machines than that of rank 0
        with (self.folder / _LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(done.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self, summary: Mapping[str, Any]) -> None:
        """Replace burn_in.json.

        Raises:
            OSError: The file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _ACCOUNT, summary)

    def summary(self, account: Account, ended: Ended | None, code: ExitCode | None) -> dict[str, Any]:
        """Return the account as JSON values.

        Args:
            account: The account.
            ended: How the burn-in ended, None while it is running.
            code: The exit code, None while it is running.
        """
        return {
            "schema": SCHEMA,
            "burn_in": {
                "job": self._job.run.name,
                "folder": str(self.folder),
                "began": self._began.isoformat(timespec="seconds"),
                "for_seconds": self._seconds,
                "seconds": round(time.monotonic() - self._started, 1),
                "ended": ended,
                "exit_code": None if code is None else int(code),
            },
            "passes": account.passes,
            "passes_complete": account.complete,
            "steps": account.cards[0].steps,
            "comparisons": account.cards[0].comparisons,
            "found": account.num_found,
            "causes": {cause: {"passes": n, "laid_to": account.laid_to[cause]} for cause, n in account.causes.items()},
            "suspects": account.suspects,
            "undecided": [{"classes": list(map(list, ids)), "passes": n} for ids, n in account.undecided.items()],
            "cards": [card.as_dict() for card in account.cards],
            "warnings": dict(account.warnings),
            "passes_found": [{**done.as_dict(), "again": self.settings(done)} for done in account.found],
        }

    def settings(self, done: PassDone) -> str:
        """Return the settings with which `dreplica train` repeats the pass."""
        seeds = dict(done.seed)
        if self._job.data.augment is None:
            seeds.pop("augment", None)  # without augmentation it would be refused as a setting without effect
        settings = [f"--seed.{key} {value}" for key, value in seeds.items()]
        return " ".join([f"--config {shlex.quote(str(self.folder / CONFIG_NAME))}", *settings])

    def again(self, done: PassDone, cards: Sequence[Card]) -> str:
        """Return the command that repeats the pass alone."""
        num_hosts = len({card.host for card in cards})
        nodes = "" if num_hosts == 1 else f"--nodes {num_hosts} --node-rank … --head … "
        return f"dreplica train {nodes}--replicas {len(cards) // num_hosts} {self.settings(done)}"
