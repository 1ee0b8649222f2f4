"""`dreplica certify-resume`: prove that an interrupted run equals an uninterrupted one, bit for bit."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dreplica.agreement.trace.reader import Key, Trace
from dreplica.agreement.trace.run_report import ReportError, RunReport
from dreplica.commands.scratch_folder import fresh_folder
from dreplica.distributed.launch.background import Finished, run_in_background
from dreplica.distributed.signals import signals_as_interrupts
from dreplica.errors import ExitCode, UsageError
from dreplica.state.fingerprint.stage import STAGES

_COMPONENTS = {
    "indices": "the position in the data",
    "batch": "state that loading or augmenting a sample depends on",
    "buffers": "buffers, or other state that the forward pass depends on in addition to the weights",
    "output": "state that the forward pass depends on in addition to weights and buffers",
    "gradients": "state that the backward pass depends on",
    "optimizer": "the state of the optimizer, the scheduler or the scaler",
    "weights": "weights, or other state that the optimizer step depends on",
    "rng": "the state of the random number generators",
    "predictions": "state that the evaluation depends on",
}
"""Stage at which a difference begins to the state that was not restored."""
_TAIL_LINES = 15


@dataclass(frozen=True)
class Certificate:
    """The result of the comparison."""

    passed: bool
    text: str
    """The result in one line."""


def certify_resume(settings: Sequence[str], num_replicas: int, at_step: int, keep: Path | None = None) -> ExitCode:
    """Run a job without an interruption, then interrupted and resumed, and compare the two runs.

    The run is resumed in new processes. Prints a certificate, or the first component that was not restored.

    Args:
        settings: The config settings of the job, as for `dreplica train`.
        num_replicas: Number of replicas.
        at_step: The step after which the run is interrupted.
        keep: An empty or new folder, in which the run folders are kept.

    Returns:
        AGREED or DIVERGED. UNUSABLE or FAILED if a run failed.

    Raises:
        UsageError: `keep` cannot be used.
    """
    console = Console(highlight=False)
    with signals_as_interrupts(), fresh_folder(keep, "certify") as root:
        common = [*settings, f"--run.root={root}", "--run.resume=auto"]
        console.print(f"1 of 3: the uninterrupted run (output in {root})")
        ended = _run(root, "straight", common, num_replicas)
        if ended.code != ExitCode.AGREED:
            return _failed("the uninterrupted run failed", ended)
        num_steps = max((step for step, _ in _read_trace(root / "straight")), default=0)
        if at_step >= num_steps:
            print(
                f"error: --at-step: expected less than the {num_steps} steps of the run, got {at_step}.",
                file=sys.stderr,
            )
            return ExitCode.UNUSABLE
        console.print(f"2 of 3: the same run, stopped after step {at_step}")
        ended = _run(root, "interrupted", [*common, f"--run.stop_after={at_step}"], num_replicas)
        if ended.code != ExitCode.STOPPED:
            return _failed("the run could not be stopped", ended)
        console.print("3 of 3: the run resumed, in new processes")
        ended = _run(root, "interrupted", common, num_replicas)
        if ended.code not in (ExitCode.AGREED, ExitCode.DIVERGED) and ended.error is None:
            return _failed("the resumed run failed", ended)
        certificate = judge(root / "straight", root / "interrupted", at_step, ended.error)
        if not certificate.passed:
            _run(root, "straight-again", common, num_replicas)
            again = _first_difference(root / "straight", root / "straight-again")
            if again is not None:
                certificate = _does_not_reproduce(*again)
    mark = "[green]CERTIFIED[/]" if certificate.passed else "[red]NOT CERTIFIED[/]"
    console.print(mark, end=" ")
    console.print(certificate.text, markup=False, soft_wrap=True)
    return ExitCode.AGREED if certificate.passed else ExitCode.DIVERGED


def judge(straight: Path, interrupted: Path, at_step: int, error: UsageError | None = None) -> Certificate:
    """Compare all digests and results of an uninterrupted and of a resumed run.

    Args:
        straight: The run folder of the uninterrupted run.
        interrupted: The run folder of the interrupted and resumed run.
        at_step: The step after which it was interrupted.
        error: The error for which the run could not be resumed, None if it was.

    Returns:
        The certificate.
    """
    if error is not None:
        return Certificate(False, str(error))
    try:
        folder = straight
        one = RunReport.read(folder)
        folder = interrupted
        other = RunReport.read(folder)
    except ReportError as unreadable:
        return Certificate(False, f"{folder.name}: {unreadable}")
    for skipped in other.run.skipped_checkpoints:
        text = f"skipped checkpoint {skipped.name}: {skipped.reason} (replica {skipped.replica})"
        return Certificate(False, text)
    if other.run.resumed_from != at_step:
        return Certificate(False, f"it resumed from step {other.run.resumed_from}, expected step {at_step}")
    one_algorithm, other_algorithm = _algorithm(straight), _algorithm(interrupted)
    if one_algorithm != other_algorithm:
        return Certificate(False, f"digests of {one_algorithm} cannot be compared with those of {other_algorithm}")
    difference = _first_difference(straight, interrupted)
    if difference is not None:
        step, stage = difference
        if (step, stage == "predictions") <= (at_step, False):
            return _does_not_reproduce(step, stage)  # before the interruption
        return Certificate(False, f"not restored: {_COMPONENTS.get(stage, stage)} (step {step}, {stage})")
    for field in ("fingerprints", "epochs"):
        if getattr(one, field) != getattr(other, field):
            return Certificate(False, f"not restored: state that {field} in report.json depends on")
    trace = _read_trace(interrupted)
    after = [digests for (step, _), digests in trace.items() if step > at_step]
    num_digests = sum(map(len, after))
    last = max(step for step, _ in trace)
    return Certificate(
        True,
        f"interrupted after step {at_step} of {last}: {last - at_step} steps resumed, {num_digests} digests of "
        f"their stages, {len(one.epochs)} epochs' results and the final state equal those of the uninterrupted run",
    )


def _does_not_reproduce(step: int, stage: str) -> Certificate:
    text = f"the job does not reproduce even without an interruption: step {step}, {stage}"
    return Certificate(False, f"{text}. Find the cause first: dreplica train --replicas 2")


def _first_difference(one: Path, other: Path) -> tuple[int, str] | None:
    """Return the first step and stage at which two traces differ, or None.

    A line that only the second trace has is ignored.
    """
    here, there = _read_trace(one), _read_trace(other)
    for key in sorted(here.keys() & there.keys()):
        for stage in STAGES:
            if here[key].get(stage) != there[key].get(stage):
                return key[0], stage
    missing = [step for step, _ in here.keys() - there.keys()]
    return (min(missing), "steps") if missing else None


def _algorithm(folder: Path) -> str | None:
    """Return the fingerprint algorithm of a recorded run, or None if it has no trace."""
    try:
        return Trace(folder).algorithm
    except UsageError:
        return None


def _read_trace(folder: Path) -> dict[Key, Mapping[str, str]]:
    try:
        trace = Trace(folder)
        return {line.key: trace.digests(line) for line in trace.lines()}
    except UsageError as error:
        if error.code == "damaged-trace":
            raise
        return {}  # the run ended before it recorded a step


def _run(root: Path, name: str, arguments: Sequence[str], num_replicas: int) -> Finished:
    """Run the job once, with its output in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    settings = [*arguments, f"--run.name={name}"]
    return run_in_background("dreplica.worker", settings, num_replicas, root / f"{name}.log")


def _failed(what: str, ended: Finished) -> ExitCode:
    """Print why a run failed, and return the exit code of this command."""
    if ended.error is not None:
        print(f"error: {ended.error}", file=sys.stderr)
        return ExitCode.UNUSABLE
    tail = "\n".join(ended.output.splitlines()[-_TAIL_LINES:])
    print(f"error: {what} (exit code {ended.code}):\n{tail}", file=sys.stderr)
    return ExitCode.FAILED
