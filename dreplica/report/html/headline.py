"""The top of the report: what became of the run, in plain words, and what to do about it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.report.html.charts import name_replicas
from dreplica.report.html.run_files import RunFiles

_STAGES_IN_WORDS = {
    "indices": "the sample indices",
    "batch": "the batch",
    "buffers": "the buffers",
    "output": "the model's output",
    "gradients": "the gradients",
    "optimizer": "the optimizer's state",
    "weights": "the weights",
    "rng": "the random number generators",
    "predictions": "the predictions",
}


@dataclass
class Remedy:
    """A line of what to do."""

    text: str
    remark: str
    """What follows a `#` in it."""
    is_code: bool
    """Whether it is to be pasted as it is, rather than read."""


@dataclass
class Headline:
    """The verdict as a person reads it."""

    tone: str
    """`good`, `bad`, `warn` or `open`: decides the colour, beside the words."""
    label: str
    """One or two words."""
    cause: str
    """Its code; empty where there is no verdict, or nothing to blame."""
    title: str
    sentences: list[str]
    facts: list[tuple[str, str]] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)


def headline(run: RunFiles) -> Headline:
    """What to say first of a run."""
    report = run.report or {}
    verdict = report.get("verdict")
    if not verdict:
        return _without_verdict(run)
    summary = str(verdict.get("summary", ""))
    stopped_after = (report.get("run") or {}).get("stopped_after")
    if verdict.get("cause") != "none":
        parted = bool((report.get("divergence") or {}).get("stage_classes"))
        return _of_cause(verdict, summary, len(report.get("replicas") or []), parted)
    if stopped_after is not None:
        goes_on = "The same command goes on from the newest checkpoint."
        if not run.has_checkpoint:
            goes_on = "There is no checkpoint in its folder: the same command begins anew."
        before = f"{_upper(summary.partition('; stopped on request')[0])}."
        return Headline("warn", "Stopped", "", f"Stopped on request after step {stopped_after}.", [before, goes_on])
    if run.num_replicas == 1:
        return Headline("good", "Recorded", "", f"{_upper(summary)}.", [])
    label = "Independent" if report.get("expect") == "independent" else "Agreed"
    return Headline("good", label, "", f"{_upper(summary)}.", [])


def _of_cause(verdict: dict[str, Any], summary: str, replicas: int, parted: bool) -> Headline:
    """`parted`: whether it was found by comparing replicas' states, rather than by looking at each."""
    code = str(verdict.get("cause"))
    cause = CAUSES.get(code)
    evidence = [str(line) for line in verdict.get("evidence") or []]
    if cause is not None and evidence[:1] == [cause.explanation]:
        del evidence[0]  # it is the title
    label = {"replica-lost": "Replica lost", "unexplained": "Unexplained"}.get(code, "Fault found")
    return Headline(
        tone="bad",
        label="Diverged" if parted else label,
        cause=code,
        title=cause.explanation if cause is not None else summary,
        sentences=[
            (parted and _where(verdict)) or f"{_upper(summary.removeprefix(f'{code}: '))}.",
            *_who(verdict, replicas),
        ],
        facts=_facts(verdict, replicas, parted),
        remedies=[_remedy(str(line)) for line in verdict.get("remedy") or []],
        evidence=evidence,
    )


def _where(verdict: dict[str, Any]) -> str | None:
    """Where replicas parted; None if it is not told."""
    step, stage, tensor = (verdict.get(key) for key in ("step", "stage", "tensor"))
    if step is None or stage is None:
        return None
    epoch = f" of epoch {verdict['epoch']}" if verdict.get("epoch") else ""
    when = "at the build, before the first step" if step == 0 else f"at step {step}{epoch}"
    if verdict.get("phase") == "evaluation":
        when = f"in the evaluation after step {step}{epoch}"
    first = f", first in {tensor}" if tensor else ""
    return f"They parted {when}, in {_STAGES_IN_WORDS.get(stage, stage)}{first}."


def _who(verdict: dict[str, Any], replicas: int) -> list[str]:
    suspects, classes = verdict.get("suspects") or [], verdict.get("classes") or []
    if verdict.get("cause") == "replica-lost":
        return []
    if suspects:
        return [f"Suspected: {name_replicas(suspects, replicas)}."]
    return ["No replica is singled out."] if len(classes) > 1 else []


def _facts(verdict: dict[str, Any], replicas: int, parted: bool) -> list[tuple[str, str]]:
    facts = [
        ("step", "0, the build" if verdict.get("step") == 0 else verdict.get("step")),
        ("epoch", verdict.get("epoch")),
        ("stage", verdict.get("stage")),
        ("tensor", verdict.get("tensor")),
        ("module", verdict.get("module")),
        ("operator", verdict.get("operator")),
        ("phase", verdict.get("phase")),
    ]
    classes = verdict.get("classes") or []
    if parted and len(classes) > 1:
        facts.append(("alike among themselves", "; ".join(name_replicas(ids, replicas) for ids in classes)))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _remedy(line: str) -> Remedy:
    text, _, remark = line.partition("  #")
    is_code = bool(remark) or text.startswith(("--", "dreplica ", "torchrun ", "pip ", "sudo ", "random.seed("))
    return Remedy(text, remark.strip(), is_code)


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
        sentences.insert(0, f"Replicas differ at step {trace.first_differing}; the cause has not been written down.")
    again = "The verdict is written at the end; dreplica report makes this page anew."
    tone = "open" if trace.first_differing is None else "bad"
    return Headline(tone, "No verdict", "", "Still running, or ended without a report.", [*sentences, again])


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
