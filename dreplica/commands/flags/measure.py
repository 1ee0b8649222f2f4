"""Starts the job in one setting of its flags after another, and keeps what came of each."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreplica.agreement.trace.comparison import compare_traces
from dreplica.agreement.trace.reader import Trace
from dreplica.commands.flags.flags import STRICT, Variant
from dreplica.commands.flags.trial import FOUND_NAME, LOST_NAME, REFUSED_NAME
from dreplica.config.schema import RunConfig
from dreplica.distributed.launch.background import Finished, run_in_background
from dreplica.errors import ExitCode

_TAIL_LINES = 15


class TrialFailed(Exception):
    """The job could not be started, or ended otherwise than by what is looked for; the text says how."""


@dataclass(frozen=True)
class Outcome:
    """What came of one start."""

    variant: Variant
    device: str
    """`cpu` or `cuda`; empty where the start did not get to its end."""
    steps: int
    """That were trained, twice, and agreed; 0 where they did not."""
    seconds: Mapping[Variant, Sequence[float]]
    """Per step, for each round in which this setting and the others timed beside it were; empty if none was."""
    folder: Path
    """Where its trace is."""
    verdict: Mapping[str, Any] | None = None
    """Where and why it parted; None if it did not."""
    between: str = ""
    """What parted: `replicas`, `repetitions` in one process, `starts`; or it ended in the `preparation`."""
    refused: Mapping[str, Any] | None = None
    """The operator that raised, where strict mode does not let it run: step, operator, module, phase, message. The last
    alone, where it does not let the job start; with the phase `build` or `memory`, where that was built or was used up.
    """

    @property
    def agrees(self) -> bool:
        """Whether all that was compared was the same."""
        return self.verdict is None and self.refused is None

    @property
    def seconds_per_step(self) -> float | None:
        """In this setting: the median over the rounds; None if it could not be timed."""
        own = self.seconds.get(self.variant)
        return statistics.median(own) if own else None


class Measurements:
    """All starts so far.

    Args:
        config: the job's; its section `determinism` is replaced.
        num_replicas: of each start.
        steps: to train each time.
        root: where their folders go.
        timeout: seconds until a start that does not end is ended.
        tell: called with a line after each start.
    """

    def __init__(
        self,
        config: RunConfig,
        num_replicas: int,
        steps: int,
        root: Path,
        timeout: float,
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._num_replicas, self._steps = config, num_replicas, steps
        self._root, self._timeout, self._tell = root, timeout, tell
        self._outcomes: dict[Variant, list[Outcome]] = {}
        self._rounds: list[dict[Variant, Outcome]] = []
        self._num_starts = 0

    def of(self, variant: Variant) -> Sequence[Outcome]:
        """All starts in this setting."""
        return self._outcomes.get(variant, [])

    def num_starts(self, variant: Variant) -> int:
        """How many of them there were; a setting that does not start has an outcome without one."""
        return 0 if variant.unusable is not None else len(self.of(variant))

    def agrees(self, variant: Variant) -> bool:
        """Whether all of them agreed, in themselves and with each other."""
        return all(outcome.agrees for outcome in self.of(variant))

    def first_parted(self, variant: Variant) -> Outcome | None:
        """The first of them that did not."""
        return next((outcome for outcome in self.of(variant) if not outcome.agrees), None)

    def measure(self, variants: Iterable[Variant], rounds: int, beside: Sequence[Variant]) -> None:
        """Rounds of one start in each setting, in another order each time; `beside`: settings timed in each, too."""
        order = list(variants)
        for _ in range(rounds):
            self._rounds.append({variant: self.start(variant, beside) for variant in order})
            order = [*order[1:], order[0]]

    def try_out(self, variant: Variant, times: int) -> bool:
        """Starts in this setting, as often as that, or to the first that parts; whether none did."""
        return all(self.start(variant).agrees for _ in range(times))

    def ratios(self, one: Variant, other: Variant) -> list[float]:
        """Time per step in one setting over that in the other.

        One for each round of timing in processes that timed both; where none did, for each round of starts.
        """
        outcomes = [outcome for outcomes in self._outcomes.values() for outcome in outcomes]
        both = [outcome.seconds for outcome in outcomes if one in outcome.seconds and other in outcome.seconds]
        if both:
            return [a / b for row in both for a, b in zip(row[one], row[other], strict=True)]
        rows = [row for row in self._rounds if one in row and other in row]
        pairs = [(row[one].seconds_per_step, row[other].seconds_per_step) for row in rows]
        return [a / b for a, b in pairs if a is not None and b is not None]

    def same_numbers(self, variant: Variant, other: Variant) -> bool | None:
        """Whether both settings come to the same bits; None where one does not come to anything that can be told."""
        if not (self.of(variant) and self.of(other) and self.agrees(variant) and self.agrees(other)):
            return None
        return _parted_at(self.of(other)[0].folder, self.of(variant)[0].folder) is None

    def start(self, variant: Variant, beside: Sequence[Variant] = ()) -> Outcome:
        """One start; `beside`: other settings to time in it, too, those that may be in one process.

        A setting in which no job starts is not tried. Raises UsageError if the job cannot be run at all, TrialFailed if
        it fails otherwise.
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
        others = [other for other in beside if other != variant and other.process == variant.process]
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
        self._tell(f"start {self._num_starts}, {variant.name}: {words}")
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
            verdict = _parted_at(earlier.folder, folder)
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
    """Median, smallest and largest; None of none."""
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def describe(outcome: Outcome) -> str:
    """Where it parted, or what raised, in words."""
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
    is_to_blame = verdict["cause"] == "nondeterministic-operator"
    operator = f"{': ' if is_to_blame else ', first seen at '}{_operator(verdict)}" if verdict.get("operator") else ""
    return f"{outcome.between} part{when} ({place or verdict['cause']}){operator}"


def _operator(row: Mapping[str, Any]) -> str:
    if not row.get("operator"):
        return ""
    return str(row["operator"]) + (f" in {row['module']}" if row.get("module") else "") + f" ({row['phase']})"


def _parted_at(one: Path, other: Path) -> dict[str, Any] | None:
    """Where two recorded trainings part, as far as their traces tell."""
    found = compare_traces(Trace(one), Trace(other))
    place = found.place
    if place is None:
        return None
    summary = f"another start of the same job parted {place.when}: {place.where}"
    return {
        "cause": "unexplained",
        "summary": summary,
        "step": place.step,
        "stage": place.stage,
        "tensor": place.tensor,
        "evidence": [f"differing stages: {', '.join(place.differing_stages)}"],
        "remedy": [],
    }
