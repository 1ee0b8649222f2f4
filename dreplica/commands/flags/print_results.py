"""Terminal output of `dreplica flags`."""

from collections.abc import Callable, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.commands.flags.flag_search import Row, Study
from dreplica.commands.flags.flags import Variant, to_paste
from dreplica.commands.flags.measure import Outcome, describe, spread


def print_study(console: Console, found: Study) -> None:
    """Print the table, the smallest set with its cost, the lines to paste and the evidence."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if found.strict.divergent is not None:
        _say_strict_fails(say, found.strict.divergent)
        return
    smallest, off = found.smallest, found.off
    assert smallest is not None
    assert off is not None
    console.print(_table(found, off))
    _say_more(say, found, off)
    needed = ", ".join(found.needed)
    say(f"SMALLEST SET {needed}" if needed else f"SMALLEST SET none: no flag was needed in {found.steps} steps")
    keys, lines = to_paste(smallest.variant.disabled, found.device)
    section = yaml.safe_dump(dict(keys), default_flow_style=True, sort_keys=False, width=1000).strip()
    say(f"  determinism: {section}")
    say("  " + " ".join(f"--determinism.{key} {_value(value)}" for key, value in keys.items()))
    for line in lines:
        say(f"  {line}")
    say(f"  time per step: {_cost(found, smallest, off)}")
    for line in _evidence(found, smallest):
        say(line)


def _say_strict_fails(say: Callable[[str], None], divergent: Outcome) -> None:
    warn = "--determinism.mode warn  # runs it, without a guarantee that it agrees"
    if divergent.refused is not None:
        say(f"STRICT MODE DOES NOT RUN {describe(divergent)}")
        say(f"  {divergent.refused['message']}")
        remedies = [*(str(Remedy(**item)) for item in divergent.refused.get("remedy", [])), warn]
    else:
        assert divergent.verdict is not None
        say(f"NOT EVEN IN STRICT MODE {describe(divergent)}")
        say(f"  {divergent.verdict['summary']}")
        for item in divergent.verdict["evidence"]:
            say(f"  evidence: {item['text']}")
        remedies = [str(Remedy(**item)) for item in divergent.verdict["remedy"]]
    for line in remedies:
        say(f"  remedy: {line}")
    say("fix this first: no set of flags was searched for")


def _table(found: Study, off: Row) -> Table:
    replicas = f"{found.num_replicas} replica{'s' * (found.num_replicas > 1)}"
    title = f"{replicas} on {found.device}, {found.steps} steps"
    table = Table(title=title, title_justify="left")
    for column in ("switched off", "needed", "the job then", "time / strict", "numbers"):
        table.add_column(column, overflow="fold")
    for name, row in found.flags.items():
        table.add_row(name, "yes" if name in found.needed else "no", *_cells(row))
    table.add_row("all of them", "", *_cells(off), end_section=True)
    for row in found.options:
        table.add_row(f"none, and {_option(row.variant)}", "", *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    then = "agrees"
    if row.divergent is not None:
        then = "does not agree" if row.divergent.refused is None else "does not run"
    numbers = {None: "", True: "as strict", False: "others"}[row.as_strict]
    return [then, _ratio(row.ratios), numbers]


def _say_more(say: Callable[[str], None], found: Study, off: Row) -> None:
    """Print the details that do not fit into the table."""
    for name, row in [*found.flags.items(), ("all of them", off)]:
        if row.divergent is not None:
            say(f"{name} off: {describe(row.divergent)}")
    for row in found.options:
        if row.divergent is not None:
            say(f"{_option(row.variant)}: {describe(row.divergent)}")
    for name, row in found.flags.items():
        for other in sorted(row.variant.disabled - {name}):
            say(f"{other} has no effect without {name}")
    if found.no_effect:
        say(f"no effect on {found.device}: {', '.join(found.no_effect)}")
    for line in found.not_measured:
        say(f"not measured: {line}")


def _cost(found: Study, smallest: Row, off: Row) -> str:
    to_strict = f"{_ratio(smallest.ratios)} x strict mode's" if smallest.variant.disabled else "strict mode's"
    if smallest.variant == off.variant:
        return to_strict
    to_off = _ratio(found.smallest_to_off)
    return f"{to_strict}, {to_off} x with everything off" if to_off else to_strict


def _evidence(found: Study, smallest: Row) -> list[str]:
    starts, steps = smallest.num_starts, found.steps
    parts = [f"{steps * starts} with those of the first training in the same process"]
    if found.num_replicas > 1:
        parts.insert(0, f"{2 * steps * starts} between {found.num_replicas} replicas")
    if starts > 1:
        parts.append(f"{steps * (starts - 1)} with those of the first start")
    lines = [
        f"evidence, not proof: {steps} steps, trained twice in each of {starts} starts of this setting; all state "
        f"after each step compared: {', '.join(parts)}. A rare race, a later step, another batch size or another GPU "
        "may need more flags."
    ]
    free = [name for name, row in found.flags.items() if name not in found.needed and _costs_nothing(row)]
    if free:
        lines.append(f"no cost of {', '.join(free)} is measurable: keep them, which is safer")
    return lines


def _costs_nothing(row: Row) -> bool:
    """Return True if the rounds do not agree on whether a step is faster without the flag."""
    return bool(row.ratios) and max(row.ratios) >= 1.0


def _ratio(ratios: Sequence[float]) -> str:
    found = spread(ratios)
    return "" if found is None else f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def _option(variant: Variant) -> str:
    assert variant.option is not None
    return f"{variant.option[0]} {_value(variant.option[1])}"


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").strip("'")
