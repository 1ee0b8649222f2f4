"""What `dreplica compare` says of two runs: evidence and notes, and how they are printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreplica.agreement.trace.comparison import Comparison
from dreplica.agreement.trace.line import GENERATOR_NAMES
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_metadata import NO_CONFIG, RecordedRun, RunDifference, fold_distributions, show
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import Place, count_differing_entries

MOST_NAMED = 4

_WORDS = {
    "identical": ("IDENTICAL", "green"),
    "prefix": ("SAME SO FAR", "yellow"),
    "samples": ("SAME SAMPLES", "yellow"),
    "differ": ("DIFFERENT", "red"),
}
_FILES = {"config": "config.yaml", "manifest": "manifest.json"}


def print_comparison(
    console: Console,
    names: tuple[str, str],
    differences: Mapping[str, list[RunDifference] | None],
    recorded: Mapping[str, Sequence[bool]],
    comparison: Mapping[str, Any],
) -> None:
    """Print tables of the differences in config and manifest, notes, the result, and where the runs differ.

    Args:
        console: The console.
        names: The names of the two runs.
        differences: The differences in `config` and `manifest`, None where a run has not recorded them.
        recorded: For `config` and `manifest`, whether each run has recorded it.
        comparison: The comparison as JSON values.
    """
    for title, items in differences.items():
        if items is None:
            has = [name for name, is_recorded in zip(names, recorded[title], strict=True) if is_recorded]
            console.print(f"{title}: {f'recorded only in {escape(has[0])}' if has else 'not recorded'}", soft_wrap=True)
        elif items:
            console.print(_table(title, names, fold_distributions(items)))
        else:
            console.print(f"{title}: the same")
    for note in comparison["notes"]:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
    word, colour = _WORDS[comparison["outcome"]]
    console.print(f"[bold {colour}]{word}[/] {escape(comparison['summary'])}", soft_wrap=True)
    first = comparison["first_difference"]
    if first is None:
        return
    keys = ("step", "epoch", "stage", "tensor", "module", "phase")
    parts = [f"{key} {first[key]}" for key in keys if first[key] is not None]
    parts += [f"{axis} {position}" for axis, position in (first["coordinate"] or {}).items()]
    line = ", ".join(parts)
    console.print(f"  where: {escape(line)}", soft_wrap=True)
    for evidence in comparison["evidence"]:
        console.print(f"  evidence: {escape(evidence['text'])}", soft_wrap=True)
    console.print(f"  explain: {comparison['explain']}", soft_wrap=True)


def _table(title: str, names: tuple[str, str], items: Sequence[RunDifference]) -> Table:
    table = Table(title=f"{title}: differences", title_justify="left")
    for column in ("key" if title == "config" else "field", *map(escape, names)):
        table.add_column(column, overflow="fold")
    for item in sorted(items, key=lambda item: not item.matters):
        field = escape(item.field) if item.matters else f"{escape(item.field)} *"
        table.add_row(field, escape(show(item.one)), escape(show(item.other)), style=None if item.matters else "dim")
    if not all(item.matters for item in items):
        table.caption, table.caption_justify = "* does not affect digests", "left"
    return table


def find_evidence(found: Comparison, names: tuple[str, str]) -> list[Evidence]:
    """Return what is known about the first difference between two runs.

    Args:
        found: The comparison.
        names: The names of the two runs.
    """
    place = found.place
    if place is None:
        return []
    evidence = [Evidence.of("differing-stages", stages=place.differing_stages)]
    if place.num_entries:
        evidence.append(count_differing_entries(place))
        some = list(place.only_on.items())[:MOST_NAMED]
        evidence += [Evidence.of("entry-one-sided", entry=name, side=f"in {names[ids[0]]}") for name, ids in some]
    else:
        evidence.append(Evidence.of("tensor-not-in-both"))
    if "rng" in place.differing_stages:
        evidence += _drawn_from(found.not_drawn, names)
    if found.num_steps:
        evidence.append(Evidence.of("steps-before-same", steps=found.num_steps, digests=found.num_digests))
    return evidence


def _drawn_from(not_drawn: tuple[Sequence[str], Sequence[str]], names: tuple[str, str]) -> list[Evidence]:
    """Return the evidence about generators that only one of the runs has drawn from."""
    return [
        Evidence.of("generator-drawn-one-sided", generator=label, side=f"in {names[name in not_drawn[0]]}")
        for name, label in GENERATOR_NAMES.items()
        if (name in not_drawn[0]) != (name in not_drawn[1])
    ]


def explain_command(place: Place) -> str:
    """Return the command that prints what usually makes two runs differ at a place."""
    return f"dreplica explain {'build' if place.step == 0 and place.phase is None else place.stage}"


def find_notes(
    names: tuple[str, str],
    traces: tuple[Trace, Trace],
    runs: Sequence[RecordedRun],
    found: Comparison,
) -> list[str]:
    """Return remarks for the reader, one line each.

    Args:
        names: The names of the two runs.
        traces: Their traces, which have been read to their ends.
        runs: The further content of their folders.
        found: The comparison.
    """
    notes = []
    for name, trace, run, alone in zip(names, traces, runs, found.num_alone, strict=True):
        notes += [f"{name}: {line}" for line in run.problems if not (run.is_of_custom_loop and line == NO_CONFIG)]
        if run.manifests is not None and run.report is None and set(run.problems) <= {NO_CONFIG}:
            notes.append(f"{name}: has no report, so the run was interrupted or is in progress")
        if trace.is_cut_off:
            notes.append(f"{name}: the last line is incomplete and was ignored; the last step is {trace.last_key[0]}")
        if trace.first_repeated is not None:
            notes.append(f"{name}: resumed from before step {trace.first_repeated}; the later results count")
        if trace.diverged_at is not None:
            verdict = None if run.report is None else run.report.verdict
            cause = "" if verdict is None else f" ({verdict.cause})"
            notes.append(
                f"{name}: its own {trace.num_replicas} replicas diverged at step {trace.diverged_at}{cause}; "
                "the trace has the digests of replica 0"
            )
        if alone:
            notes.append(f"{name}: {alone} checked steps or evaluations that the other run has not recorded")
    if traces[0].torch_version != traces[1].torch_version:
        notes.append(f"torch {traces[0].torch_version} and {traces[1].torch_version}")
    if traces[0].num_replicas != traces[1].num_replicas:
        notes.append(f"{traces[0].num_replicas} and {traces[1].num_replicas} replicas")
    if found.epochs_differ_at is not None:
        notes.append(f"epoch numbers differ from step {found.epochs_differ_at} on, which affects no digest")
    if found.num_unknown:
        notes.append(
            f"rng was not compared in {found.num_unknown:,} steps: a run that resumed does not know whether Python's "
            "and NumPy's generators were drawn from before"
        )
    return notes
