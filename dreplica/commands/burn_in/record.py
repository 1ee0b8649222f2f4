"""The record of a burn-in: `burn_in.jsonl`, a line per pass as it ends, and `burn_in.json`, the account so far."""

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
"""How a burn-in can end: its time was up; it was told to stop; no pass came to a step; a replica was lost; what it was
given could not be used any more."""


class Record:
    """What is written down, by one replica, and what is told of it.

    Args:
        folder: the burn-in's.
        job: what is trained in each pass.
        seconds: how long the burn-in is to go on.
    """

    def __init__(self, folder: Path, job: RunConfig, seconds: float) -> None:
        self.folder = folder
        self._job, self._seconds = job, seconds
        self._began, self._started = datetime.now(UTC), time.monotonic()

    def add(self, done: PassDone, account: Account) -> None:
        """Writes down a pass, at once: the next one may not end. Raises UsageError where that cannot be done."""
        try:
            self.append(done)
            self.write(self.summary(account, None, None))
        except OSError as error:
            raise self.cannot_write(error) from None

    def cannot_write(self, error: OSError) -> UsageError:
        """What to tell of it."""
        return UsageError(
            f"run.root: {str(self.folder)!r} cannot be written to any more ({error.strerror}). Make room, or name "
            "another with --run.root."
        )

    def append(self, done: PassDone) -> None:
        """Adds a line. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine than rank 0's it need not be there
        with (self.folder / _LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(done.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self, summary: Mapping[str, Any]) -> None:
        """Writes the account, in place of the one before. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _ACCOUNT, summary)

    def summary(self, account: Account, ended: Ended | None, code: ExitCode | None) -> dict[str, Any]:
        """All that is known, as JSON values. `ended`, `code`: None while it goes on."""
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
        """The settings with which `dreplica train` does the same as that pass."""
        seeds = (f"--seed.{key} {value}" for key, value in done.seed.items())
        return " ".join([f"--config {shlex.quote(str(self.folder / CONFIG_NAME))}", *seeds])

    def again(self, done: PassDone, cards: Sequence[Card]) -> str:
        """The command that runs that pass again, by itself."""
        num_hosts = len({card.host for card in cards})
        nodes = "" if num_hosts == 1 else f"--nodes {num_hosts} --node-rank … --head … "
        return f"dreplica train {nodes}--replicas {len(cards) // num_hosts} {self.settings(done)}"
