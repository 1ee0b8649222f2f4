"""Judging a verdict on a plant against the expectation."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from dreplica.agreement.verdict.verdict import Verdict
from tests.benchmarks.mistakes.kinds import Kind
from tests.benchmarks.mistakes.run_plant import PER_EPOCH
from tests.benchmarks.mistakes.site import Site

HARDWARE = frozenset({"transient-fault", "persistent-fault"})
_AMBIGUOUS = re.compile("code that ran once|inconclusive")
"""Words of a first line of evidence that leaves open whether code or a fault changed a few bits."""
_LINE = re.compile(r"\w+\.py:\d+")


@dataclass
class Judged:
    """A plant, what was found, and what is wrong with it."""

    kind: Kind
    site: Site
    verdict: Verdict | None
    problems: list[str] = field(default_factory=list)
    """What is wrong, in capitals where it may never be."""

    @property
    def found(self) -> str:
        """The cause that was found."""
        return "none" if self.verdict is None else self.verdict.cause

    @property
    def is_right(self) -> bool:
        """True if the cause is one that is expected."""
        return self.found in {self.kind.cause, *self.kind.also}

    @property
    def counts(self) -> bool:
        """True if the plant counts for the share of causes that are found."""
        communicates = self.site.setting == "ddp"
        agrees = self.verdict is None and self.kind.may_agree
        return not (communicates or agrees or self.kind.is_small)


def judge(kind: Kind, site: Site, verdict: Verdict | None) -> Judged:
    """Compare a verdict with the expectation."""
    judged = Judged(kind, site, verdict)
    add = judged.problems.append
    if verdict is None:
        if kind.cause != "none" and not kind.may_agree:
            add("MISSED")
        return judged
    if kind.cause == "none":
        add("FALSE ALARM")
        return judged
    _judge_place(judged, verdict, add)
    if verdict.cause in HARDWARE and not kind.is_small:
        add("HARDWARE")
    elif not judged.is_right and verdict.cause != "unexplained" and not kind.is_small:
        add("WRONG CAUSE")
    elif not judged.is_right and site.setting != "ddp" and not kind.is_small:
        add("not explained")
    text = "\n".join(map(str, [*verdict.evidence, *verdict.remedy]))
    if (
        verdict.cause == "unexplained"
        and not kind.is_small
        and site.setting != "ddp"
        and verdict.step
        and not _LINE.search(text)
    ):
        add("no line")
    if kind.is_small and not judged.is_right and not _AMBIGUOUS.search(str(verdict.evidence[0])):
        add("ambiguity not said")
    return judged


def _judge_place(judged: Judged, verdict: Verdict, add: Callable[[str], None]) -> None:
    kind = judged.kind
    step = expected_step(kind, judged.site)
    later = kind.may_agree and step is not None and (verdict.step or 0) > step
    if step is not None and verdict.step != step and not later:
        add(f"WRONG STEP {verdict.step}, expected {step}")
    elif kind.stages and verdict.stage not in kind.stages:
        add(f"WRONG STAGE {verdict.stage}, expected {' or '.join(kind.stages)}")
    elif kind.tensor is not None and kind.tensor != verdict.tensor:
        add(f"WRONG TENSOR {verdict.tensor}, expected {kind.tensor}")


def expected_step(kind: Kind, site: Site) -> int | None:
    """Return the step that must be named, None if there is none."""
    acted = site.memory.get("hit", site.acted)
    steps = {"acted": acted, "first": 1, "at": site.at, "after": None if acted is None else acted + 1}
    return {**steps, "evaluation": PER_EPOCH, "before-training": None}[kind.when]
