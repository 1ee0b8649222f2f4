"""`dreplica compare`: did two runs, made at different times or places, come to the same, bit for bit?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dreplica.agreement.trace.comparison import Comparison, compare_traces
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_metadata import (
    RecordedRun,
    RunDifference,
    config_differences,
    manifest_differences,
    read_run,
    show,
)
from dreplica.agreement.verdict.location import Place, module_of
from dreplica.errors import ExitCode, UsageError

_MOST_NAMED = 4


class RunPair:
    """Two recorded runs, compared.

    Raises UsageError where a trace is missing or cannot be compared with the other.

    Attributes:
        outcome: `identical`; `differ`; `prefix`: the same up to where the run that ends sooner ends; or `samples`: the
            same samples, and of the states nothing is recorded, neither on the way nor at the end.
        config, manifest: in what the runs differ; None where one of them does not say.
        notes: what else a reader should know, a line each.
    """

    def __init__(self, one: Path, other: Path) -> None:
        self.names = str(one), str(other)
        self.traces = Trace(one), Trace(other)
        runs = tuple(read_run(trace.path.parent) for trace in self.traces)
        self.config: list[RunDifference] | None = None
        self.manifest: list[RunDifference] | None = None
        if runs[0].config is not None and runs[1].config is not None:
            self.config = config_differences(runs[0].config, runs[1].config)
        if runs[0].manifests is not None and runs[1].manifests is not None:
            self.manifest = manifest_differences(runs[0].manifests, runs[1].manifests)
        self.found = compare_traces(*self.traces)
        if self.found.place is None and not self.found.num_digests:
            raise UsageError(
                f"{self.names[0]!r} and {self.names[1]!r} have recorded no stage of any step both: there is nothing to "
                "compare. Record both with the same --agreement.every and --agreement.expect."
            )
        ends = [trace.last_key for trace in self.traces]
        self.sooner = ends.index(min(ends))
        """Which ends first."""
        self.outcome = "identical" if ends[0] == ends[1] else "prefix"
        self.final: dict[str, list[int]] | None = None
        """Stage to the replicas whose state at the end is another; None where that is not what to go by."""
        if self.found.place is not None:
            self.outcome = "differ"
        elif self.outcome == "identical" and self.found.only_samples:
            went_on = any(run.last_step is not None and run.last_step < ends[0][0] for run in runs)
            self.final = None if went_on else _differ_at_the_end(*runs)
            self.outcome = "samples" if self.final is None else "differ" if any(self.final.values()) else "identical"
        self.notes = _notes(self.names, self.traces, runs, self.found)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        found = self.found
        if found.place is not None:
            return f"parted {_where(found.place)}; {self._differing_in()}"
        stages = ", ".join(stage for stage, count in found.num_same.items() if count)
        what = f"{found.num_steps:,} steps, {found.num_digests:,} digests of {stages}"
        if self.outcome == "samples":
            return (
                f"{what}; nothing is known of the states: those of independent replicas are not recorded step by step"
            )
        if self.final is not None:
            parted = ", ".join(f"{stage} on replicas {ids}" for stage, ids in self.final.items() if ids)
            if parted:
                return f"the same samples, and other states at the end: {parted}; {self._differing_in()}"
            what += f"; the same {', '.join(self.final)} at the end"
        if self.outcome == "prefix":
            step, is_evaluation = self.traces[self.sooner].last_key
            after = "the evaluation after " * is_evaluation
            return f"{self.names[self.sooner]} ends at {after}step {step}; up to there both are the same: {what}"
        given = self._given(self.config)
        although = f"; although they differ in {given}" if given else ""
        return f"{what}{although}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        found, place = self.found, self.found.place
        first: dict[str, Any] | None = None
        if place is not None:
            first = {"step": place.step, "epoch": found.epoch, "stage": place.stage, "tensor": place.tensor}
            first |= {"module": module_of(place.stage, place.tensor), "phase": place.phase}
            first |= {"differing_stages": place.differing_stages}
            first |= {"num_differing": place.num_differing, "num_entries": place.num_entries}
        runs = [
            {
                "trace": str(trace.path),
                "replicas": trace.num_replicas,
                "last_step": trace.last_key[0],
                "parted_at": trace.diverged_at,
                "cut_off": trace.is_cut_off,
            }
            for trace in self.traces
        ]
        rows = {"config": self.config, "manifest": self.manifest}
        return {
            "outcome": self.outcome,
            "summary": self.summary,
            "first_difference": first,
            "differ_at_the_end": self.final,
            "steps_same": found.num_steps,
            "digests_same": found.num_same,
            "algorithm": self.traces[0].algorithm,
            "runs": runs,
            **{name: None if items is None else [asdict(item) for item in items] for name, items in rows.items()},
            "notes": self.notes,
        }

    def _differing_in(self) -> str:
        """Differences, and no more than that: which of them is the cause, two records cannot say."""
        parts = [
            f"the {name} in {given}"
            for name, items in (("configs differ", self.config), ("manifests", self.manifest))
            if (given := self._given(items))
        ]
        if parts:
            return " and ".join(parts)
        if self.config is None or self.manifest is None:
            return "in what the runs differ is not recorded"
        return "neither config nor manifest differs in anything that could account for it"

    @staticmethod
    def _given(items: list[RunDifference] | None) -> str:
        named = [f"{item.field} ({show(item.one)}, {show(item.other)})" for item in items or () if item.matters]
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        return ", ".join(named[:_MOST_NAMED]) + more


def compare_runs(one: Path, other: Path, as_json: bool = False, prefix: bool = False) -> ExitCode:
    """Compares two runs and prints what is found.

    Returns AGREED if they are the same, DIVERGED if they differ, and FAILED if one ends sooner and they are the same up
    to there (AGREED then, too, with `prefix`), or if nothing is known but that their samples are. Raises UsageError
    where they cannot be compared.
    """
    pair = RunPair(one, other)
    if as_json:
        print(json.dumps(pair.as_dict(), indent=1))
    else:
        _print(Console(highlight=False), pair)
    if pair.outcome == "differ":
        return ExitCode.DIVERGED
    same = pair.outcome == "identical" or (pair.outcome == "prefix" and prefix and not pair.found.only_samples)
    return ExitCode.AGREED if same else ExitCode.FAILED


def _print(console: Console, pair: RunPair) -> None:
    for title, items in (("config", pair.config), ("manifest", pair.manifest)):
        if items is None:
            console.print(f"{title}: not compared")
        elif items:
            console.print(_table(title, pair.names, items))
        else:
            console.print(f"{title}: the same")
    for note in pair.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
    word, colour = {
        "identical": ("IDENTICAL", "green"),
        "prefix": ("SAME SO FAR", "yellow"),
        "samples": ("SAME SAMPLES", "yellow"),
        "differ": ("DIFFERENT", "red"),
    }[pair.outcome]
    console.print(f"[bold {colour}]{word}[/] {escape(pair.summary)}", soft_wrap=True)
    place = pair.found.place
    if place is None:
        return
    first = pair.as_dict()["first_difference"]
    keys = ("step", "epoch", "stage", "tensor", "module", "phase")
    line = ", ".join(f"{key} {first[key]}" for key in keys if first[key] is not None)
    console.print(f"  where: {escape(line)}", soft_wrap=True)
    for line in _evidence(pair.found, place):
        console.print(f"  evidence: {escape(line)}", soft_wrap=True)


def _differ_at_the_end(one: RecordedRun, other: RecordedRun) -> dict[str, list[int]] | None:
    """By stage, the replicas that both have and whose final states are not the same; None if not both say, or say it
    of different steps."""
    if None not in (one.last_step, other.last_step) and one.last_step != other.last_step:
        return None
    common = [key for key in one.final if key in other.final]
    differing: dict[str, list[int]] = {stage: [] for _, stage in common}
    for replica_id, stage in common:
        if one.final[replica_id, stage] != other.final[replica_id, stage]:
            differing[stage].append(replica_id)
    return differing or None


def _table(title: str, names: tuple[str, str], items: list[RunDifference]) -> Table:
    table = Table(title=f"{title}: differences", title_justify="left")
    for column in ("key" if title == "config" else "field", *map(escape, names)):
        table.add_column(column, overflow="fold")
    for item in sorted(items, key=lambda item: not item.matters):
        field = escape(item.field) if item.matters else f"{escape(item.field)} *"
        table.add_row(field, escape(show(item.one)), escape(show(item.other)), style=None if item.matters else "dim")
    if not all(item.matters for item in items):
        table.caption, table.caption_justify = "* changes no digest", "left"
    return table


def _where(place: Place) -> str:
    when = "at the build (step 0)" if place.step == 0 else f"at step {place.step}"
    if place.phase is not None:
        when = f"in the {place.phase} after step {place.step}"
    return f"{when}: {', '.join(part for part in (place.stage, place.tensor) if part)}"


def _evidence(found: Comparison, place: Place) -> list[str]:
    lines = [f"differing stages: {', '.join(place.differing_stages)}"]
    if place.num_entries:
        lines.append(f"{place.num_differing} of {place.num_entries} entries of {place.stage} differ")
        some = list(place.only_on.items())[:_MOST_NAMED]
        lines += [f"{name} is only in the {('first', 'second')[ids[0]]}" for name, ids in some]
    else:
        lines.append("which tensor it is was not recorded on both sides: --agreement.record tensors")
    if found.num_steps:
        lines.append(f"{found.num_steps:,} steps before are the same, in {found.num_digests:,} digests")
    return lines


def _notes(
    names: tuple[str, str],
    traces: tuple[Trace, Trace],
    runs: tuple[RecordedRun, ...],
    found: Comparison,
) -> list[str]:
    notes = []
    for name, trace, run, alone in zip(names, traces, runs, found.num_alone, strict=True):
        notes += [f"{name}: {line}" for line in run.problems]
        if trace.is_cut_off:
            notes.append(f"{name}: the last line was cut off, and is left out; step {trace.last_key[0]} is the last")
        if trace.first_repeated is not None:
            notes.append(f"{name}: gone on with from before step {trace.first_repeated}; what came of it later counts")
        if trace.diverged_at is not None:
            verdict = None if run.report is None else run.report.verdict
            cause = "" if verdict is None else f" ({verdict.cause})"
            notes.append(
                f"{name}: its own {trace.num_replicas} replicas had parted at step {trace.diverged_at}{cause}; "
                "the trace has replica 0's digests"
            )
        if alone:
            notes.append(f"{name}: {alone} checked steps or evaluations that the other has not recorded")
    if traces[0].torch_version != traces[1].torch_version:
        notes.append(f"torch {traces[0].torch_version} and {traces[1].torch_version}")
    if traces[0].num_replicas != traces[1].num_replicas:
        notes.append(f"{traces[0].num_replicas} and {traces[1].num_replicas} replicas")
    if found.epochs_differ_at is not None:
        notes.append(f"they count epochs otherwise from step {found.epochs_differ_at} on, which no digest depends on")
    return notes
