"""Terminal output of a burn-in: lines for passes, and the final tables."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.commands.burn_in.cards import HARDWARE, Account, Card, PassDone
from dreplica.commands.burn_in.job_config import spell_duration

_SECONDS_BETWEEN_LINES = 10.0
_COLOURS = {"suspect": "red", "lost": "red", "in doubt": "yellow", "not checked": "yellow", "clean": "green"}
_ENDED = {
    "time": "the time is over",
    "told": "stopped on request",
    "idle": "ended early: several passes in a row ended before their first step",
    "lost": "a replica was lost",
    "unusable": "its input became unusable",
}
_MOST_WARNINGS = 10
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class PassLines:
    """Lines for passes as they end: all with a finding, and one every ten seconds of the others.

    Args:
        console: The console to print to.
        seconds: Requested duration of the burn-in, in seconds.
        enabled: Print. True on one replica.
    """

    def __init__(self, console: Console, seconds: float, enabled: bool) -> None:
        self._console, self._enabled = console, enabled
        self._end = time.monotonic() + seconds
        self._last_shown = 0.0

    def show(self, done: PassDone, again: str) -> None:
        """Print the line of a pass that has ended, and for a finding the command (`again`) that repeats it."""
        now = time.monotonic()
        if not self._enabled or not (done.found or now - self._last_shown >= _SECONDS_BETWEEN_LINES):
            return
        self._last_shown = now
        left = f"{spell_duration(max(0.0, self._end - now))} left"
        self._print(f"pass {done.number}  {done.verdict.summary}  {done.seconds:.1f} s, {left}")
        if done.found:
            self._print(
                f"  suspects: {done.verdict.suspects or 'none singled out'}; report: {done.folder or 'not kept'}"
            )
            self._print(f"  again: {again}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_account(console: Console, account: Account, summary: Mapping[str, Any]) -> None:
    """Print the tables of devices and checks, their meaning, and a last line for scripts.

    Args:
        console: The console to print to.
        account: The account of the burn-in.
        summary: The account as JSON values, from `Record.summary`.
    """
    run = summary["burn_in"]
    console.print(_cards(account.cards))
    console.print(_checks(account.cards))
    for line in conclusions(account):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    ended = f"{spell_duration(run['seconds'])} of {spell_duration(run['for_seconds'])}: {_ENDED[run['ended']]}"
    for line in (f"record: {run['folder']}", ended, last_line(summary)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def last_line(summary: Mapping[str, Any]) -> str:
    """Return the line for scripts: `BURN-IN`, then words of the form key=value."""
    run = summary["burn_in"]
    words = {
        "found": summary["found"],
        "suspects": ",".join(map(str, summary["suspects"])) or "none",
        "passes": summary["passes"],
        "steps": summary["steps"],
        "comparisons": summary["comparisons"],
        "seconds": run["seconds"],
        "ended": run["ended"],
        "exit": run["exit_code"],
    }
    return " ".join(["BURN-IN", *(f"{key}={value}" for key, value in words.items())])


def conclusions(account: Account) -> Iterator[str]:
    """Yield lines that say what the tables mean, and what to do."""
    cards = account.cards
    for card in cards:
        if card.state == "suspect":
            named = Counter({cause: n for cause, n in card.suspected.items() if cause in HARDWARE})
            yield f"SUSPECT {describe(card)}: named in {card.named} of {_passes(account.passes)}: {_counted(named)}"
            yield f"  remedy: {_remedy(named)}"
        if card.lost is not None:
            yield f"LOST {describe(card)}: {card.lost}"
        yield from _new_memory_errors(card)
    for classes, number in account.undecided.items():
        yield from _undecided(cards, classes, number)
    for kind, text in (("open", "OPEN, device or not"), ("software", "SOFTWARE, no device accused")):
        causes = Counter({cause: n for cause, n in account.causes.items() if account.laid_to[cause] == kind})
        if causes:
            first = min((account.first[cause] for cause in causes), key=lambda done: done.number)
            yield f"{text}: {_counted(causes)}; first in pass {first.number}: {first.verdict.summary}"
    yield from _shared(cards)
    for warning, number in account.warnings.most_common(_MOST_WARNINGS):
        yield f"warning, in {_passes(number)}: {warning}"


def describe(card: Card) -> str:
    """Return a description with which a person finds the device."""
    last = card.health[-1] if card.health else {}
    known = {"UUID": card.uuid, "PCI": last.get("pci_bus_id"), "serial": last.get("serial")}
    return ", ".join(
        [f"replica {card.replica}: host {card.host}", card.device, card.name]
        + [f"{what} {value}" for what, value in known.items() if value]
    )


def _cards(cards: list[Card]) -> Table:
    table = Table(title="cards", title_justify="left")
    for column in ("replica", "host", "device", "name", "UUID", "driver"):
        table.add_column(column, overflow="fold")
    for card in cards:
        cells = (str(card.replica), card.host, card.device, card.name, card.uuid or "-", card.driver or "-")
        table.add_row(*map(escape, cells))
    return table


def _checks(cards: list[Card]) -> Table:
    table = Table(title="checks", title_justify="left")
    for column in ("replica", "passes", "steps", "compared", "hashed", "named", "in doubt", "state"):
        table.add_column(column, justify="left" if column in {"replica", "state"} else "right", overflow="fold")
    for card in cards:
        state = f"[{_COLOURS[card.state]}]{card.state}[/]"
        counts = (card.replica, card.passes, card.steps, card.comparisons)
        table.add_row(*map(str, counts), _size(card.bytes_hashed), str(card.named), str(card.in_doubt), state)
    return table


def _undecided(cards: list[Card], classes: tuple[tuple[int, ...], ...], number: int) -> Iterator[str]:
    sides = " against ".join(f"replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}" for ids in classes)
    yield f"UNDECIDED in {_passes(number)}: {sides}, without a majority. Any of these may be faulty:"
    involved = {replica_id for ids in classes for replica_id in ids}
    yield from (f"  {describe(card)}" for card in cards if card.replica in involved)
    yield (
        "  remedy: burn in with a third card, so that there is a majority: --replicas 3, or one more machine in "
        "--nodes; or pair each of them with a clean card"
    )


def _new_memory_errors(card: Card) -> Iterator[str]:
    for key in ("ecc_uncorrected", "ecc_corrected"):
        counts = [row[key] for row in card.health if isinstance(row.get(key), int)]
        if len(counts) == 2 and counts[1] > counts[0]:
            more = f"{counts[1] - counts[0]} more {key.removeprefix('ecc_')} memory errors than before"
            yield f"ECC {describe(card)}: {more}"


def _shared(cards: list[Card]) -> Iterator[str]:
    by_place: dict[tuple[str, str], list[int]] = {}
    for card in cards:
        by_place.setdefault(card.place, []).append(card.replica)
    for (host, place), ids in by_place.items():
        if len(ids) > 1:
            names = ", ".join(map(str, ids))
            yield f"note: replicas {names} share {place} of {host}: its faults can affect all of them"


def _remedy(named: Counter[str]) -> str:
    return CAUSES[max(named, key=lambda cause: (cause == "persistent-fault", named[cause]))].remedy[0].text


def _passes(number: int) -> str:
    return f"{number} pass{'es' * (number != 1)}"


def _counted(causes: Counter[str]) -> str:
    return ", ".join(f"{cause} {number}" for cause, number in causes.most_common())


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
