"""The result of a comparison in one line, with what was compared."""

import logging
from collections.abc import Sequence

from dreplica.agreement.trace.report_records import Coverage
from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.state.fingerprint.stage import STAGES

_PACKAGE = "dreplica"
_OF_TENSORS = frozenset({"no-second-copy", "partial"})
"""Codes of what is not compared that the line names: a part of the stages that it lists."""


def describe_result(
    coverage: Coverage, steps_taken: int, steps_checked: int, stages_seen: set[str], recorded: str | None
) -> str:
    """Return one line: the result, the number of steps, the ranks and the stages.

    Args:
        coverage: What was compared.
        steps_taken: Number of steps that this process took.
        steps_checked: Number of steps that were hashed.
        stages_seen: Stages that were hashed at least once.
        recorded: Path of the run folder that was recorded, or None.
    """
    stages = ", ".join(stage for stage in STAGES if stage in stages_seen)
    if coverage.has_second_copy and coverage.ranks == 1:
        stages = ", ".join(coverage.stages)
    steps = _count(steps_checked, steps_taken)
    reference = coverage.reference
    nothing = ""
    if reference is not None and not reference.steps:
        nothing = f"; {reference.run} has none of these steps and stages, so nothing was compared with it"
    if coverage.has_second_copy and stages:
        mesh = f" ({coverage.mesh})" if coverage.mesh else ""
        sides = [f"{coverage.ranks} ranks{mesh}"] if coverage.ranks > 1 else []
        if reference is not None and reference.steps:
            sides.append(f"with {reference.run}{_fewer(reference.stages, stages)}")
            steps = _count(reference.steps, steps_taken)
        when = steps if steps_taken else "the build"
        end = f"; recorded in {recorded}" if recorded else ""
        parts = [each.text for each in coverage.not_compared if each.code in _OF_TENSORS]
        rest = "".join(f"; not compared: {text}" for text in parts)
        return f"AGREED {' and '.join(sides)}, {when}: {stages}{rest}{end}{nothing}"
    if recorded and stages:
        return f"RECORDED {steps} in {recorded}: {stages}{nothing}"
    if coverage.ranks > 1 or coverage.every == 0 or reference is not None:
        return f"NOT COMPARED {steps}{nothing}"
    return f"NOT COMPARED {steps}: this process is alone. Pass record= to compare two runs, or start several processes"


def count_warnings(warnings: Sequence[Evidence]) -> str:
    """Return the number of warnings as the end of the line, or an empty string."""
    count = len(warnings)
    return f"; {count} {'warning' if count == 1 else 'warnings'}" if count else ""


def _fewer(compared: Sequence[str] | None, stages: str) -> str:
    """Return the stages compared with the reference in parentheses, if they are fewer than those in `stages`."""
    listed = ", ".join(compared or ())
    return f" ({listed})" if listed and listed != stages else ""


def _count(steps: int, taken: int) -> str:
    plural = "step" if taken == 1 else "steps"
    return f"{steps:,} {plural}" if steps == taken else f"{steps:,} of {taken:,} {plural}"


def describe_loss(error: ReplicaLost, agreed_until: int) -> Verdict:
    """Return the verdict on a run that ended because another rank was lost.

    Args:
        error: The error of this rank.
        agreed_until: The newest step at which all ranks are known to have agreed, or -1.
    """
    return Verdict(
        agreed=False,
        cause="replica-lost",
        summary=str(error).partition("\n")[0],
        step=max(agreed_until, 0),
        suspects=[item.replica_id for item in error.lost],
        evidence=[Evidence.of("replica-lost", replica=item.replica_id, reason=item.reason) for item in error.lost],
        remedy=list(CAUSES["replica-lost"].remedy),
    )


class _Formatter(logging.Formatter):
    """Formatter that says which lines are warnings."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # the name in logging
        line = super().formatMessage(record)
        return line.replace("dreplica: ", "dreplica: warning: ", 1) if record.levelno >= logging.WARNING else line


def show_log() -> None:
    """Print the log of dreplica to stderr, unless the program has configured logging.

    Python prints only warnings by default, so the result of a script that does not configure logging would be silent.
    """
    logger = logging.getLogger(_PACKAGE)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        # If the program configures logging later, its handlers take over.
        handler.addFilter(lambda record: not logging.getLogger().handlers)
        handler.setFormatter(_Formatter("dreplica: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
