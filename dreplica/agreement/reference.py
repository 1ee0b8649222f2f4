"""A recorded run that a running one is compared with, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreplica.agreement.trace.comparison import find_differing_stages, place_of
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


class Reference:
    """The trace of a recorded run, for `Agreement`. Only rank 0 needs it.

    Steps and stages that the reference has not recorded are not compared.

    Args:
        path: Path of the run folder or of the trace file.
        algorithm: The algorithm of this run's digests.

    Raises:
        UsageError: If there is no trace, or if its digests are of another algorithm than this run's.

    Attributes:
        trace: The recorded trace, already read once from start to end.
        num_compared: Number of checked steps and evaluations that were compared and equal so far.
        only_samples: True if only `indices` and `batch` were compared so far, and no state of any replica.
    """

    def __init__(self, path: Path, algorithm: str = ALGORITHM) -> None:
        self.trace = Trace(path)
        self._name = str(path)
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
        self.num_compared = 0
        self.only_samples = True
        self._lines = self.trace.lines()
        self._line = next(self._lines, None)
        self._has_begun = False

    def compare(self, step: int, is_evaluation: bool, stages: Mapping[str, Stage]) -> ReferenceDifference | None:
        """Compare a checked step with the recorded one. Call it for the steps in order.

        Args:
            step: The training step.
            is_evaluation: True for the evaluation that follows the step.
            stages: This run's digests.

        Returns:
            The difference, or None if there is none or the reference has not recorded this step.
        """
        key = step, is_evaluation
        while self._line is not None and self._line.key <= key:
            line, self._line = self._line, next(self._lines, None)
            if line.key == key:
                recorded = self.trace.digests(line)
                own = {name: stage.digest.hex() for name, stage in stages.items()}
                differing_stages = find_differing_stages(own, recorded)
                if differing_stages:
                    place = place_of(key, differing_stages, stages, self.trace.tensors(line))
                    return ReferenceDifference(self._name, place, recorded, is_first=not self._has_begun)
                self.num_compared += bool(own.keys() & recorded.keys())
                self.only_samples = self.only_samples and own.keys() & recorded.keys() <= set(INDEPENDENT_STAGES)
                self._has_begun = step > 0
        return None


class ReferenceDiffers(Divergence):
    """All replicas agree, but they differ from the reference.

    Args:
        verdict: The verdict, which says where.
        difference: The difference from the reference.
    """

    def __init__(self, verdict: Verdict, difference: ReferenceDifference) -> None:
        super().__init__(verdict)
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
    if place.num_entries:
        sides = ("here", "in the reference")
        evidence.insert(0, count_differing_entries(place))
        evidence += [
            Evidence.of("entry-one-sided", entry=name, side=sides[ids[0]])
            for name, ids in list(place.only_on.items())[:_MOST_NAMED]
        ]
    else:
        evidence.append(Evidence.of("tensor-not-recorded"))
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
