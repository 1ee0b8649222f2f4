"""`dreplica compare`: compare two recorded runs bit for bit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dreplica.agreement.trace.comparison import compare_traces
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_metadata import (
    RecordedRun,
    RunDifference,
    config_differences,
    manifest_differences,
    read_run,
    show,
)
from dreplica.agreement.verdict.location import module_of
from dreplica.commands.compare_text import (
    MOST_NAMED,
    explain_command,
    find_evidence,
    find_notes,
    print_comparison,
)
from dreplica.errors import ExitCode, UsageError


class RunPair:
    """Two recorded runs and their comparison.

    Args:
        one: The first run: a run folder or a trace.jsonl.
        other: The second run, as `one`.

    Attributes:
        outcome: `identical`, `differ`, `prefix` (the same up to the end of the shorter run) or `samples` (the same
            samples, with no state recorded, neither per step nor at the end).
        config: The differences between the configs. None if a run has no readable config.
        manifest: The differences between the manifests. None if a run has no readable manifest.
        sooner: Index of the run that ends first.
        final: Stage to the replicas whose final states differ. None unless the outcome depends on the final states.
        notes: Remarks for the reader, one line each.
        recorded: For `config` and `manifest`, True for each run that has recorded it.

    Raises:
        UsageError: A trace is missing, or the two traces cannot be compared.
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
            configured = self.config is not None
            self.manifest = manifest_differences(runs[0].manifests, runs[1].manifests, configured)
        self.found = compare_traces(*self.traces)
        if self.found.place is None and not self.found.num_digests:
            raise UsageError(
                f"{self.names[0]!r} and {self.names[1]!r} have no recorded stage of any step in common. Record both "
                "with the same every, stages and expect (in the trainer: --agreement.every, --agreement.expect).",
                code="nothing-in-common",
            )
        ends = [trace.last_key for trace in self.traces]
        self.sooner = ends.index(min(ends))
        self.outcome = "identical" if ends[0] == ends[1] else "prefix"
        self.final: dict[str, list[int]] | None = None
        if self.found.place is not None:
            self.outcome = "differ"
        elif self.outcome == "identical" and self.found.only_samples:
            continued = any(run.last_step is not None and run.last_step < ends[0][0] for run in runs)
            self.final = None if continued else _differ_at_the_end(*runs)
            self.outcome = "samples" if self.final is None else "differ" if any(self.final.values()) else "identical"
        self.notes = find_notes(self.names, self.traces, runs, self.found)
        self.recorded = {
            "config": [run.config is not None for run in runs],
            "manifest": [run.manifests is not None for run in runs],
        }

    @property
    def summary(self) -> str:
        """The result in one line."""
        found = self.found
        if found.place is not None:
            return f"diverged {found.place.when}: {found.place.where}; {self._differing_in()}"
        stages = ", ".join(stage for stage, count in found.num_same.items() if count)
        what = f"{found.num_steps:,} step{'s' * (found.num_steps != 1)}, {found.num_digests:,} digests of {stages}"
        if self.outcome == "samples":
            return f"{what}; the states are unknown: those of independent replicas are not recorded at each step"
        if self.final is not None:
            differing = ", ".join(f"{stage} on replicas {ids}" for stage, ids in self.final.items() if ids)
            if differing:
                return f"the same samples, but different states at the end: {differing}; {self._differing_in()}"
            what += f"; the same {', '.join(self.final)} at the end"
        if self.outcome == "prefix":
            step, is_evaluation = self.traces[self.sooner].last_key
            after = "the evaluation after " * is_evaluation
            return f"{self.names[self.sooner]} ends at {after}step {step}; up to there both are the same: {what}"
        given = self._given(self.config)
        although = f"; the configs differ in {given} nevertheless" if given else ""
        return f"{what}{although}"

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        found, place = self.found, self.found.place
        first: dict[str, Any] | None = None
        if place is not None:
            first = {"step": place.step, "epoch": found.epoch, "stage": place.stage, "tensor": place.tensor}
            first |= {"module": module_of(place.stage, place.tensor), "phase": place.phase}
            first |= {"differing_stages": place.differing_stages, "coordinate": found.coordinate}
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
            "evidence": [item.as_dict() for item in find_evidence(found, self.names)],
            "explain": None if place is None else explain_command(place),
            "differ_at_the_end": self.final,
            "steps_same": found.num_steps,
            "digests_same": found.num_same,
            "algorithm": self.traces[0].algorithm,
            "runs": runs,
            **{name: None if items is None else [asdict(item) for item in items] for name, items in rows.items()},
            "notes": self.notes,
        }

    def _differing_in(self) -> str:
        """Return the differences in config and manifest, without naming a cause, which two records cannot prove."""
        parts = [
            f"the {name} in {given}"
            for name, items in (("configs differ", self.config), ("manifests", self.manifest))
            if (given := self._given(items))
        ]
        if parts:
            return " and ".join(parts)
        compared = [name for name, items in (("config", self.config), ("manifest", self.manifest)) if items is not None]
        if not compared:
            return "how the runs differ is not recorded"
        where = "config or manifest" if len(compared) > 1 else f"the {compared[0]}"
        return f"no difference in {where} explains it"

    @staticmethod
    def _given(items: list[RunDifference] | None) -> str:
        named = [f"{item.field} ({show(item.one)}, {show(item.other)})" for item in items or () if item.matters]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        return ", ".join(named[:MOST_NAMED]) + more


def compare_runs(one: Path, other: Path, as_json: bool = False, prefix: bool = False) -> ExitCode:
    """Compare two runs and print the result.

    Args:
        one: The first run: a run folder or a trace.jsonl.
        other: The second run, as `one`.
        as_json: Print JSON instead of tables.
        prefix: Accept a run that ends sooner and is the same up to its end.

    Returns:
        AGREED if the runs are identical, DIVERGED if they differ. FAILED if one ends sooner and `prefix` is not set,
        or if only their samples are known to be the same.

    Raises:
        UsageError: The runs cannot be compared.
    """
    pair = RunPair(one, other)
    if as_json:
        print(json.dumps(pair.as_dict(), indent=1))
    else:
        differences = {"config": pair.config, "manifest": pair.manifest}
        print_comparison(Console(highlight=False), pair.names, differences, pair.recorded, pair.as_dict())
    if pair.outcome == "differ":
        return ExitCode.DIVERGED
    same = pair.outcome == "identical" or (pair.outcome == "prefix" and prefix and not pair.found.only_samples)
    return ExitCode.AGREED if same else ExitCode.FAILED


def _differ_at_the_end(one: RecordedRun, other: RecordedRun) -> dict[str, list[int]] | None:
    """Return, by stage, the replicas whose final states differ. None if the final states are of different steps."""
    if None not in (one.last_step, other.last_step) and one.last_step != other.last_step:
        return None
    common = [key for key in one.final if key in other.final]
    differing: dict[str, list[int]] = {stage: [] for _, stage in common}
    for replica_id, stage in common:
        if one.final[replica_id, stage] != other.final[replica_id, stage]:
            differing[stage].append(replica_id)
    return differing or None
