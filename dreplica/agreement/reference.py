"""A recorded run that a running one is compared with, step by step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dreplica.agreement.trace.comparison import find_differing_stages, place_of
from dreplica.agreement.trace.line import GENERATOR_NAMES, Line
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import Place, count_differing_entries, module_of
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.errors import UsageError
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, Stage

_MOST_NAMED = 5
"""Entries named as evidence that only one side has."""


@dataclass(frozen=True)
class ReferenceDifference:
    """The first difference of a run from its reference."""

    reference: str
    """Path of the reference, as given."""
    place: Place
    """The place of the difference. The reference counts as replica 1."""
    recorded: dict[str, str]
    """The digests that the reference recorded at this place: stage to 32 hex digits."""
    is_first: bool
    """True if no earlier training step has been compared."""
    drawn: Mapping[str, bool] = field(default_factory=dict)
    """Generators that only one of the runs has drawn from, and True if that is this run."""
    damaged: str | None = None
    """What is wrong with the reference's digests of tensors, if they are damaged."""


class Reference:
    """The trace of a recorded run, for `Agreement`. Only rank 0 needs it.

    Steps and stages that the reference has not recorded are not compared.

    Args:
        path: Path of the run folder or of the trace file.
        algorithm: The algorithm of this run's digests.
        resumed: True if this run resumed, so that it does not know which generators were drawn from before.
        coordinate: Where ranks hold shards, the coordinate to compare. None otherwise.

    Raises:
        UsageError: If there is no trace, if it is damaged, or if its digests are of another algorithm than this run's.

    Attributes:
        trace: The recorded trace, already read once from start to end.
        num_steps: Number of training steps that were compared and equal so far.
        num_compared: Number of checked steps and evaluations that were compared and equal so far.
        stages: Stages that were compared and equal so far, except in the build.
        only_samples: True if only `indices` and `batch` were compared so far, and no state of any replica.
    """

    def __init__(
        self,
        path: Path,
        algorithm: str = ALGORITHM,
        *,
        resumed: bool = False,
        coordinate: tuple[int, ...] | None = None,
    ) -> None:
        self.trace = Trace(path)
        self._name = str(path)
        self._resumed = resumed
        if self.trace.algorithm != algorithm:
            raise UsageError(
                f"{str(self.trace.path)!r} has digests of algorithm {self.trace.algorithm!r}, but this run computes "
                f"{algorithm!r}, so they cannot be compared. Record the reference again with this release, on the same "
                "kind of device.",
                code="algorithms-differ",
                path=str(self.trace.path),
                recorded=self.trace.algorithm,
                computed=algorithm,
            )
        self.trace.read_through()
        self.num_compared = self.num_steps = 0
        self.only_samples = True
        self.stages: set[str] = set()
        self._lines = (line for line in self.trace.lines() if line.coordinate == coordinate)
        self._line = next(self._lines, None)
        self._has_begun = False
        self._step = -1
        self._evaluations = 0

    def compare(
        self, step: int, is_evaluation: bool, stages: Mapping[str, Stage], not_drawn: Collection[str] = ()
    ) -> ReferenceDifference | None:
        """Compare a checked step with the recorded one. Call it for the steps in order.

        Args:
            step: The training step.
            is_evaluation: True for an evaluation that follows the step. There may be several.
            stages: This run's digests.
            not_drawn: Of the generators "python" and "numpy", those that this run has not drawn from.

        Returns:
            The difference, or None if there is none or the reference has not recorded this step.
        """
        self._evaluations = self._evaluations + 1 if is_evaluation and step == self._step else int(is_evaluation)
        self._step = step
        position = step, self._evaluations
        while self._line is not None and self._line.order[:2] <= position:
            line, self._line = self._line, next(self._lines, None)
            if line.order[:2] == position:
                recorded = self.trace.digests(line)
                own = {name: stage.digest.hex() for name, stage in stages.items()}
                differing_stages = find_differing_stages(own, recorded)
                one_sided = sorted(set(not_drawn) ^ set(line.not_drawn))
                is_uncertain = self._resumed or self.trace.is_uncertain(line)
                if differing_stages == ["rng"] and one_sided and is_uncertain:
                    differing_stages = []
                    del own["rng"]
                if differing_stages:
                    return self._difference(line, stages, differing_stages, one_sided)
                common = own.keys() & recorded.keys()
                self.num_compared += bool(common)
                self.only_samples = self.only_samples and common <= set(INDEPENDENT_STAGES)
                self.num_steps += step > 0 and not is_evaluation and bool(common)
                self.stages |= {name for name in common if step > 0 and stages[name].names}
                self._has_begun = step > 0
        return None

    def _difference(
        self, line: Line, stages: Mapping[str, Stage], differing_stages: list[str], one_sided: list[str]
    ) -> ReferenceDifference:
        damaged: str | None = None
        try:
            tensors = self.trace.tensors(line)
        except UsageError as error:  # the stage differs nevertheless, and the other ranks wait for this one
            tensors, damaged = None, str(error)
        return ReferenceDifference(
            self._name,
            place_of(line.key, differing_stages, stages, tensors),
            self.trace.digests(line),
            is_first=not self._has_begun,
            drawn={name: name in line.not_drawn for name in one_sided if "rng" in differing_stages},
            damaged=damaged,
        )


class ReferenceDiffers(Divergence):
    """All replicas agree, but they differ from the reference.

    Args:
        verdict: The verdict, which says where.
        difference: The difference from the reference.
        rank: The rank of this process.
    """

    def __init__(self, verdict: Verdict, difference: ReferenceDifference, rank: int = 0) -> None:
        super().__init__(verdict, rank)
        self.difference = difference


def describe_difference(difference: ReferenceDifference, epoch: int | None, num_replicas: int) -> Verdict:
    """Return the verdict that a comparison alone supports: where the runs differ.

    Args:
        difference: The difference from the reference.
        epoch: The epoch of the step, from 1.
        num_replicas: The number of replicas of this run.

    Returns:
        The verdict, with cause `unexplained`.
    """
    place = difference.place
    assert place.stage is not None
    evidence = [Evidence.of("differing-stages", stages=place.differing_stages)]
    sides = ("here", "in the reference")
    if place.num_entries:
        evidence.insert(0, count_differing_entries(place))
        evidence += [
            Evidence.of("entry-one-sided", entry=name, side=sides[ids[0]])
            for name, ids in list(place.only_on.items())[:_MOST_NAMED]
        ]
    elif difference.damaged is not None:
        evidence.append(Evidence.of("tensors-damaged", problem=difference.damaged))
    else:
        evidence.append(Evidence.of("tensor-not-recorded"))
    evidence += [
        Evidence.of("generator-drawn-one-sided", generator=GENERATOR_NAMES[name], side=sides[not here])
        for name, here in difference.drawn.items()
    ]
    return Verdict(
        agreed=False,
        cause="unexplained",
        summary=f"diverged from the reference {difference.reference} {place.when}: {place.where}",
        step=place.step,
        epoch=epoch,
        stage=place.stage,
        tensor=place.tensor,
        module=module_of(place.stage, place.tensor),
        phase=place.phase,
        groups=[list(range(num_replicas))],
        evidence=evidence,
    )
