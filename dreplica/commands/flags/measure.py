"""Starts of the job with different settings of its flags, and their outcomes."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreplica.agreement.trace.comparison import compare_traces
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.commands.flags.flags import STRICT, Variant
from dreplica.commands.flags.trial import FOUND_NAME, LOST_NAME, REFUSED_NAME
from dreplica.config.schema import RunConfig
from dreplica.distributed.launch.background import Finished, run_in_background
from dreplica.errors import ExitCode

_TAIL_LINES = 15


class TrialFailed(Exception):
    """The job could not be started, or failed for an unrelated reason, which the text names."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one start."""

    variant: Variant
    device: str
    """`cpu` or `cuda`. Empty if the start did not run to its end."""
    steps: int
    """Number of steps that were trained, twice, and agreed. 0 if they did not agree."""
    seconds: Mapping[Variant, Sequence[float]]
    """Seconds per step, one value per round, for each setting timed in this start. Empty if nothing was timed."""
    folder: Path
    """Folder with the trace."""
    verdict: Mapping[str, Any] | None = None
    """The verdict on the divergence as JSON values, None if there is none."""
    between: str = ""
    """What diverged: `replicas`, `repetitions` in one process or `starts`. `preparation` if no step was reached."""
    refused: Mapping[str, Any] | None = None
    """The operator that raised in strict mode: step, operator, module, phase and message.

    Only the message if strict mode does not let the job start. With the phase `build` if the build raised, and `memory`
    if memory was exhausted.
    """

    @property
    def agrees(self) -> bool:
        """True if everything that was compared agreed."""
        return self.verdict is None and self.refused is None

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds per step in this setting, None if it was not timed."""
        own = self.seconds.get(self.variant)
        return statistics.median(own) if own else None


class Measurements:
    """All starts so far.

    Args:
        config: The config of the job. Its section `determinism` is replaced.
        num_replicas: Number of replicas of each start.
        steps: Number of steps of each training.
        root: Folder for the folders of the starts.
        timeout: Seconds until a start is terminated.
        show_progress: Called with a line after each start.
    """

    def __init__(
        self,
        config: RunConfig,
        num_replicas: int,
        steps: int,
        root: Path,
        timeout: float,
        show_progress: Callable[[str], None],
    ) -> None:
        self._config, self._num_replicas, self._steps = config, num_replicas, steps
        self._root, self._timeout, self._show_progress = root, timeout, show_progress
        self._outcomes: dict[Variant, list[Outcome]] = {}
        self._rounds: list[dict[Variant, Outcome]] = []
        self._num_starts = 0

    def of(self, variant: Variant) -> Sequence[Outcome]:
        """Return all starts with this setting."""
        return self._outcomes.get(variant, [])

    def num_starts(self, variant: Variant) -> int:
        """Return the number of starts. A setting that cannot start has an outcome, but no start."""
        return 0 if variant.unusable is not None else len(self.of(variant))

    def agrees(self, variant: Variant) -> bool:
        """Return True if all starts agreed, each with itself and with the others."""
        return all(outcome.agrees for outcome in self.of(variant))

    def first_divergent(self, variant: Variant) -> Outcome | None:
        """Return the first start that did not agree, or None."""
        return next((outcome for outcome in self.of(variant) if not outcome.agrees), None)

    def measure(self, variants: Iterable[Variant], rounds: int, alongside: Sequence[Variant]) -> None:
        """Start the job once per round with each setting, in a different order each time.

        Args:
            variants: The settings.
            rounds: Number of rounds.
            alongside: Settings to time in each start, in addition to the variant.
        """
        order = list(variants)
        for _ in range(rounds):
            self._rounds.append({variant: self.start(variant, alongside) for variant in order})
            order = [*order[1:], order[0]]

    def try_out(self, variant: Variant, times: int) -> bool:
        """Start the job several times, up to the first start that does not agree. Return True if all agree."""
        return all(self.start(variant).agrees for _ in range(times))

    def ratios(self, one: Variant, other: Variant) -> list[float]:
        """Return the time per step in one setting divided by that in the other.

        There is one value per round of timing in processes that timed both, or per round of starts if none did.
        """
        outcomes = [outcome for outcomes in self._outcomes.values() for outcome in outcomes]
        both = [outcome.seconds for outcome in outcomes if one in outcome.seconds and other in outcome.seconds]
        if both:
            return [a / b for row in both for a, b in zip(row[one], row[other], strict=True)]
        rows = [row for row in self._rounds if one in row and other in row]
        pairs = [(row[one].seconds_per_step, row[other].seconds_per_step) for row in rows]
        return [a / b for a, b in pairs if a is not None and b is not None]

    def same_numbers(self, variant: Variant, other: Variant) -> bool | None:
        """Return True if both settings give the same bits, or None if one of them did not agree."""
        if not (self.of(variant) and self.of(other) and self.agrees(variant) and self.agrees(other)):
            return None
        return _divergence_between(self.of(other)[0].folder, self.of(variant)[0].folder) is None

    def start(self, variant: Variant, alongside: Sequence[Variant] = ()) -> Outcome:
        """Start the job once, unless the setting cannot start.

        Args:
            variant: The setting.
            alongside: Other settings to time in the same process, if they can share one.

        Returns:
            The outcome.

        Raises:
            UsageError: The job cannot run at all.
            TrialFailed: The start failed for another reason.
        """
        if variant.unusable is not None:
            outcome = Outcome(variant, "", 0, {}, self._root, refused={"message": variant.unusable})
            self._outcomes[variant] = [outcome]
            return outcome
        self._num_starts += 1
        folder = self._root / f"{self._num_starts:03}"
        folder.mkdir(parents=True)
        config = self._config.model_copy(update={"determinism": variant.section(self._config.determinism)})
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        others = [other for other in alongside if other != variant and other.process == variant.process]
        sections = [other.section(self._config.determinism).model_dump() for other in others]
        arguments = [f"--config={folder / 'config.yaml'}", f"--folder={folder}", f"--steps={self._steps}"]
        arguments.append(f"--others={json.dumps(sections)}")
        log, variables = folder / "output.log", variant.variables
        ended = run_in_background(
            "dreplica.commands.flags", arguments, self._num_replicas, log, self._timeout, variables
        )
        outcome = self._read([variant, *others], folder, ended)
        self._outcomes.setdefault(variant, []).append(outcome)
        words = "agrees" if outcome.agrees else describe(outcome)
        seconds = outcome.seconds_per_step
        words += "" if seconds is None else f", {1000 * seconds:.1f} ms per step"
        self._show_progress(f"start {self._num_starts}, {variant.name}: {words}")
        return outcome

    def _read(self, timed: Sequence[Variant], folder: Path, ended: Finished) -> Outcome:
        """Return the outcome of a start from the files that it left in `folder`."""
        variant, code = timed[0], ended.code
        tail = "\n".join(ended.output.splitlines()[-_TAIL_LINES:])
        if code is None:
            raise TrialFailed(f"{variant.name}: no end within {self._timeout:g} seconds (--timeout):\n{tail}")
        if ended.error is not None:
            raise ended.error
        if (folder / REFUSED_NAME).exists():
            refused = _read_json(folder / REFUSED_NAME)
            if refused.get("phase") == "memory" and variant == STRICT:
                raise TrialFailed(
                    f"{variant.name}: {refused['message']}. Use a smaller data.batch_size, or fewer replicas per GPU."
                )
            return Outcome(variant, "", 0, {}, folder, refused=refused)
        if code == ExitCode.STOPPED:
            raise TrialFailed(f"{variant.name}: a replica was asked to stop")
        if code != ExitCode.AGREED:
            raise TrialFailed(f"{variant.name}: exit code {code}:\n{_describe_lost(folder) or tail}")
        found = _read_json(folder / FOUND_NAME)
        verdict, between = found["verdict"], found["between"] or ""
        seconds = dict(zip(timed, found["seconds_per_step"], strict=False))  # none, if it ended before
        earlier = next((other for other in self.of(variant) if other.agrees), None)
        if verdict is None and earlier is not None:
            verdict = _divergence_between(earlier.folder, folder)
            between = "" if verdict is None else "starts"
        steps = found["steps"] if verdict is None else 0
        return Outcome(variant, found["device"], steps, seconds, folder, verdict, between)


def _describe_lost(folder: Path) -> str:
    path = folder / LOST_NAME
    rows = _read_json(path)["lost"] if path.exists() else []
    return "\n".join(f"replica {row['replica_id']} was lost: {row['reason']}" for row in rows)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def spread(ratios: Sequence[float]) -> dict[str, float] | None:
    """Return the median, the smallest and the largest ratio, or None if there is none."""
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def describe(outcome: Outcome) -> str:
    """Return in words where a start diverged, or what raised."""
    if outcome.refused is not None:
        row = outcome.refused
        if row.get("phase") == "build":
            return f"raises before the first step: {row['message']}"
        if "step" not in row:
            return str(row["message"])
        if row.get("phase") == "evaluation":
            return f"raises in the evaluation after step {row['step']}"
        return f"raises at step {row['step']}: {_operator(row) or row['message']}"
    assert outcome.verdict is not None
    verdict = outcome.verdict
    if outcome.between == "preparation":
        return f"ends before the first step ({verdict['cause']})"
    place = ", ".join(str(verdict[key]) for key in ("stage", "tensor") if verdict.get(key))
    when = f" at step {verdict['step']}" if verdict.get("step") is not None else ""
    is_cause = verdict["cause"] == "nondeterministic-operator"
    operator = f"{': ' if is_cause else ', first seen at '}{_operator(verdict)}" if verdict.get("operator") else ""
    return f"{outcome.between} diverge{when} ({place or verdict['cause']}){operator}"


def _operator(row: Mapping[str, Any]) -> str:
    if not row.get("operator"):
        return ""
    return str(row["operator"]) + (f" in {row['module']}" if row.get("module") else "") + f" ({row['phase']})"


def _divergence_between(one: Path, other: Path) -> dict[str, Any] | None:
    """Return a verdict on the first difference between two recorded trainings, or None."""
    found = compare_traces(Trace(one), Trace(other))
    place = found.place
    if place is None:
        return None
    summary = f"another start of the same job diverged {place.when}: {place.where}"
    return {
        "cause": "unexplained",
        "summary": summary,
        "step": place.step,
        "stage": place.stage,
        "tensor": place.tensor,
        "evidence": [Evidence.of("differing-stages", stages=place.differing_stages).as_dict()],
        "remedy": [],
    }
