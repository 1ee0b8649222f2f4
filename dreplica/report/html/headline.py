"""The top of the page: the result of the run in plain words, and what to do about it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.report.html.charts import name_replicas
from dreplica.report.html.run_files import RunFiles

_STAGE_NAMES = {
    "indices": "the sample indices",
    "batch": "the batch",
    "buffers": "the buffers",
    "output": "the model's output",
    "gradients": "the gradients",
    "optimizer": "the optimizer state",
    "weights": "the weights",
    "rng": "the random number generators",
    "predictions": "the predictions",
}


@dataclass
class Headline:
    """The result of a run in plain words."""

    tone: str
    """Color of the section: `good`, `bad`, `warn` or `open`."""
    label: str
    """Result in one or two words."""
    cause: str
    """Code of the cause, or empty if there is no verdict or nothing is wrong."""
    title: str
    sentences: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)


def headline(run: RunFiles) -> Headline:
    """Return the headline of a run."""
    report = run.report
    if report is None or report.verdict is None:
        return _without_verdict(run)
    summary = report.verdict.summary
    if report.verdict.cause != "none":
        return _of_cause(report, report.verdict)
    stopped_after = report.run.stopped_after
    if stopped_after is not None:
        resume = "The same command resumes from the newest checkpoint."
        if not run.has_checkpoint:
            resume = "The run folder has no checkpoint: the same command starts over."
        title = f"Stopped on request after step {stopped_after}."
        return Headline("warn", "Stopped", "", title, [f"{_capitalize(summary)}.", resume])
    has_second_copy = run.num_replicas > 1 if report.coverage is None else report.coverage.has_second_copy
    if not has_second_copy:
        return Headline("good", "Recorded", "", f"{_capitalize(summary)}.", [])
    label = "Independent" if report.expect == "independent" else "Agreed"
    return Headline("good", label, "", f"{_capitalize(summary)}.", [])


def _of_cause(report: RunReport, verdict: Verdict) -> Headline:
    code, num_replicas = verdict.cause, len(report.replicas)
    cause = CAUSES.get(code)
    # A wiring fault, for example, is found on one replica, without any comparison of states.
    diverged = bool(report.divergence and report.divergence.stage_groups)
    label = {"replica-lost": "Replica lost", "unexplained": "Unexplained"}.get(code, "Fault found")
    return Headline(
        tone="bad",
        label="Diverged" if diverged else label,
        cause=code,
        title=cause.explanation if cause is not None else verdict.summary,
        sentences=[
            (diverged and _where(verdict)) or f"{_capitalize(verdict.summary.removeprefix(f'{code}: '))}.",
            *_who(verdict, num_replicas),
        ],
        facts=_facts(verdict, num_replicas, diverged),
        remedies=verdict.remedy,
        evidence=[item.text for item in verdict.evidence if item.code != "cause"],  # that one is the title
    )


def _where(verdict: Verdict) -> str | None:
    """Return a sentence on where replicas diverged, or None if the verdict does not say."""
    step, stage = verdict.step, verdict.stage
    if step is None or stage is None:
        return None
    epoch = f" of epoch {verdict.epoch}" if verdict.epoch else ""
    when = "at the build, before the first step" if step == 0 else f"at step {step}{epoch}"
    if verdict.phase == "evaluation":
        when = f"in the evaluation after step {step}{epoch}"
    first = f", first in {verdict.tensor}" if verdict.tensor else ""
    return f"Replicas diverged {when}, in {_STAGE_NAMES.get(stage, stage)}{first}."


def _who(verdict: Verdict, num_replicas: int) -> list[str]:
    if verdict.cause == "replica-lost":
        return []
    if verdict.suspects:
        return [f"Suspected: {name_replicas(verdict.suspects, num_replicas)}."]
    return ["No replica is suspected."] if len(verdict.groups) > 1 else []


def _facts(verdict: Verdict, num_replicas: int, diverged: bool) -> list[tuple[str, str]]:
    facts = [
        ("step", "0, the build" if verdict.step == 0 else verdict.step),
        ("epoch", verdict.epoch),
        ("stage", verdict.stage),
        ("tensor", verdict.tensor),
        ("module", verdict.module),
        ("operator", verdict.operator),
        ("phase", verdict.phase),
    ]
    if diverged and len(verdict.groups) > 1:
        facts.append(("groups", "; ".join(name_replicas(ids, num_replicas) for ids in verdict.groups)))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _without_verdict(run: RunFiles) -> Headline:
    trace = run.trace
    last = "No step is recorded yet."
    if trace.last_step is not None:
        epoch = "" if trace.last_epoch is None else f" of epoch {trace.last_epoch}"
        last = f"Last step recorded: {trace.last_step}{epoch}."
    elif run.epochs:
        last = f"Last epoch recorded: {run.epochs[-1]['epoch']}."
    seconds = max(0, round((datetime.now(UTC) - run.last_written).total_seconds()))
    written = f"Last written {run.last_written:%Y-%m-%d %H:%M:%S} UTC, {duration(seconds)} before this page was made."
    sentences = [last, written]
    if trace.first_differing is not None:
        sentences.insert(0, f"Replicas differ at step {trace.first_differing}; no cause is recorded.")
    again = "The verdict is written at the end of the run. Run dreplica report again to update this page."
    tone = "open" if trace.first_differing is None else "bad"
    return Headline(tone, "No verdict", "", "Still running, or ended without a report.", [*sentences, again])


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as `3 min`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
